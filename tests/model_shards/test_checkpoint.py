"""A checkpoint at its joints: everyone gets their tensors, nobody another's, and what is wrong is told by name."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_shards.audio import AudioState
from model_shards.checkpoint import (
    COMPONENTS,
    PREFIXES,
    VOCODER_FOLDER,
    VOICE_FILE,
    Component,
    inspect,
    load_ref_audio,
    load_shard,
    load_voice,
)
from model_shards.config import load_config, parse_config
from model_shards.decoding import SamplingConfig
from model_shards.duplex import DuplexConfig, DuplexEngine, Prompt, UnitInput, UnitOutput
from model_shards.errors import ModelError
from model_shards.init import TINY, init_checkpoint
from model_shards.kv_cache import KvCache, KvShape
from model_shards.mel import StreamingMel
from model_shards.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    init_checkpoint(folder)
    return folder


def read_main(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, free of the file."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def rewrite_main(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_holds_what_the_files_hold(tiny: Path, component: Component) -> None:
    module = load_shard(tiny, component)

    files = ["model.safetensors", *(str(VOCODER_FOLDER / f"{part}.safetensors") for part in ("flow", "hift"))]
    stored = {name: tensor for file in files for name, tensor in load_file(tiny / file).items()}
    own = {name: tensor for name, tensor in stored.items() if name.startswith(PREFIXES[component])}
    state = module.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_component_needs_nobody_elses_tensors(tiny: Path) -> None:
    rewrite_main(tiny, {name: t for name, t in read_main(tiny).items() if name.startswith(PREFIXES["vision"])})

    load_shard(tiny, "vision")

    with pytest.raises(ModelError, match="holds no tensors of 'audio'"):
        load_shard(tiny, "audio")


def test_weights_become_the_dtype_that_was_asked_for(tiny: Path) -> None:
    module = load_shard(tiny, "vision", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_everything_that_does_not_fit_is_told_at_once(tiny: Path) -> None:
    tensors = read_main(tiny)
    del tensors["resampler.query"]
    tensors["vpm.surprise"] = torch.zeros(3)
    tensors["vpm.post_layernorm.bias"] = torch.zeros(7)
    tensors["apm.surprise"] = torch.zeros(3)  # another's
    rewrite_main(tiny, tensors)

    with pytest.raises(ModelError) as error:
        load_shard(tiny, "vision")

    assert "1 missing: resampler.query." in str(error.value)
    assert "1 unknown: vpm.surprise." in str(error.value)
    assert "vpm.post_layernorm.bias is (7,), the config wants (32,)" in str(error.value)
    assert "apm" not in str(error.value)


def test_a_long_list_of_names_is_cut_and_counted(tiny: Path) -> None:
    tensors = read_main(tiny)
    rewrite_main(tiny, {name: t for name, t in tensors.items() if not name.startswith("llm.model.layers.")})
    with pytest.raises(ModelError, match=r"22 missing: .* and 14 more\."):
        load_shard(tiny, "llm")


def test_tensors_that_nobody_uses_may_be_there(tiny: Path) -> None:
    rewrite_main(tiny, read_main(tiny) | {"tts.model.embed_tokens.weight": torch.zeros(4, 4)})
    load_shard(tiny, "tts")


def test_a_truncated_file_is_named(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
        load_shard(tiny, "llm")


def test_a_switched_off_component_is_told(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"init_tts": False}))
    with pytest.raises(ModelError, match="switches 'vocoder' off"):
        load_shard(tiny, "vocoder")


def split_main(folder: Path, file_of_vision: str) -> None:
    """Cut `model.safetensors` in two, with an index; the shard of the others doesn't exist."""
    tensors = read_main(folder)
    (folder / "model.safetensors").unlink()
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIXES["vision"])}
    save_file(vision, folder / "part-1.safetensors")
    weight_map = {name: file_of_vision if name in vision else "part-2.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_of_a_sharded_checkpoint_only_the_shards_in_need_are_opened(tiny: Path) -> None:
    split_main(tiny, "part-1.safetensors")

    load_shard(tiny, "vision")

    with pytest.raises(ModelError, match=r"part-2\.safetensors"):
        load_shard(tiny, "audio")


def test_an_index_can_not_point_elsewhere(tiny: Path) -> None:
    split_main(tiny, "../part-1.safetensors")
    with pytest.raises(ModelError, match="not the name of a file beside it"):
        load_shard(tiny, "vision")


def test_the_vocoder_loads_from_the_released_pickles(tiny: Path) -> None:
    folder = tiny / VOCODER_FOLDER
    expected = load_shard(tiny, "vocoder").state_dict()
    old_names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for part, prefix in (("flow", ""), ("hift", "generator.")):
        tensors = load_file(folder / f"{part}.safetensors")
        state = {prefix + name.removeprefix(f"{part}."): tensor.clone() for name, tensor in tensors.items()}
        for new, old in old_names.items():
            state = {name.replace(new, old): tensor for name, tensor in state.items()}
        torch.save(state, folder / f"{part}.pt")
        (folder / f"{part}.safetensors").unlink()

    loaded = load_shard(tiny, "vocoder").state_dict()

    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_pickle_runs_nothing(tiny: Path) -> None:
    folder = tiny / VOCODER_FOLDER
    (folder / "flow.safetensors").unlink()
    torch.save({"weight": Path("any object")}, folder / "flow.pt")
    with pytest.raises(ModelError, match="not a state dict that can be read safely"):
        load_shard(tiny, "vocoder")


def test_inspect_counts_every_component_from_the_headers(tiny: Path) -> None:
    infos = {info.component: info for info in inspect(tiny)}

    assert tuple(infos) == COMPONENTS
    for component, info in infos.items():
        tensors = load_shard(tiny, component).state_dict().values()
        assert info.num_tensors == len(tensors)
        assert info.num_parameters == sum(tensor.numel() for tensor in tensors)
        assert info.num_bytes == 4 * info.num_parameters
        assert info.dtypes == ("float32",)


def test_the_stored_voice_is_read_for_the_vocoder_and_its_sound_for_the_llm(tiny: Path) -> None:
    voice, ref_audio = load_voice(tiny), load_ref_audio(tiny)

    assert voice is not None and ref_audio is not None
    assert (voice.prompt_tokens.dtype, voice.prompt_tokens.shape) == (torch.int32, (25,))
    assert voice.prompt_mel.shape == (1, 50, 80)
    assert voice.spk_emb.shape == (1, 192)
    assert ref_audio.shape == (16000,)


def test_a_checkpoint_may_have_no_voice_but_not_half_of_one(tiny: Path) -> None:
    save_file({"spk_emb": torch.zeros(1, 192)}, tiny / VOICE_FILE)
    with pytest.raises(ModelError, match="lacks prompt_mel, prompt_tokens"):
        load_voice(tiny)

    (tiny / VOICE_FILE).unlink()
    assert load_voice(tiny) is None
    assert load_ref_audio(tiny) is None


def test_init_writes_a_small_checkpoint_that_says_it_is_untrained(tiny: Path) -> None:
    assert load_config(tiny) == TINY
    assert load_config(tiny).untrained
    assert sum(file.stat().st_size for file in tiny.rglob("*") if file.is_file()) < 10_000_000


def test_init_gives_the_same_checkpoint_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        init_checkpoint(tmp_path / name, seed=seed)

    def content(name: str) -> list[bytes]:
        return [file.read_bytes() for file in sorted((tmp_path / name).rglob("*.safetensors"))]

    assert content("one") == content("same")
    assert content("one") != content("other")


def test_init_does_not_write_over_anything(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ModelError, match="not an empty folder"):
        init_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="there is no size 'huge'; there are: tiny"):
        init_checkpoint(tmp_path / "new", size="huge")

    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_init_takes_an_empty_folder(tmp_path: Path) -> None:
    init_checkpoint(tmp_path / "deep" / "down")
    (tmp_path / "empty").mkdir()
    init_checkpoint(tmp_path / "empty")
    assert {info.component for info in inspect(tmp_path / "empty")} == set(COMPONENTS)


def converse(folder: Path, sound: Tensor) -> list[UnitOutput]:
    """Let the greedy untrained model hear `sound`, second by second."""
    tokenizer, model, encoder = Tokenizer.load(folder), load_shard(folder, "llm"), load_shard(folder, "audio")
    cache = KvCache.of_bytes(KvShape.of(model.config), 16 << 20)
    engine = DuplexEngine(model, cache, tokenizer, DuplexConfig(sampling=SamplingConfig(mode="greedy")))
    session, mel, state = engine.new_session(0), StreamingMel(), AudioState()
    engine.begin([(session, Prompt(tokenizer.encode("<|im_start|>system\n<|im_end|>")))])
    outputs = []
    for second in sound.split(16000):
        (chunk,) = mel.push(second.numpy())
        (audio,) = encoder.encode([(state, chunk)])
        outputs += engine.step([(session, UnitInput(audio=audio))])
    return outputs


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_untrained_model_listens_speaks_and_ends_its_turns(tmp_path: Path, seed: int) -> None:
    init_checkpoint(tmp_path / "tiny", seed=seed)
    noise = 0.05 * torch.randn(25 * 16000, generator=torch.Generator().manual_seed(seed))

    outputs = converse(tmp_path / "tiny", noise)

    assert sum(output.is_listen for output in outputs[3:]) >= 2
    assert sum(output.turn_start for output in outputs) >= 2
    assert sum(output.end_of_turn for output in outputs) >= 2
    spoken = "".join(output.text for output in outputs)
    assert len(spoken) > 20
    assert spoken.isascii() and spoken.isprintable()


def test_the_talkers_window_is_read_under_its_official_name() -> None:
    tts = parse_config({"tts_config": {"streaming_sliding_window_audio_window_size": 48}}, {}).tts
    assert tts is not None
    assert tts.sliding_window_tokens == 48
