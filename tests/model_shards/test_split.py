"""A split checkpoint: the same weights in one file per component; what is not as the manifest tells is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_shards.checkpoint import (
    COMPONENTS,
    PREFIXES,
    VOCODER_FOLDER,
    Component,
    check,
    inspect,
    load_ref_audio,
    load_shard,
    load_voice,
)
from model_shards.config import FlowConfig, HiftConfig, load_config
from model_shards.errors import ModelError
from model_shards.flow import Flow
from model_shards.hift import HiftGenerator
from model_shards.hift_causal import CausalHiftGenerator
from model_shards.init import TINY, init_checkpoint
from model_shards.split import read_manifest, split_checkpoint, verify_split
from model_shards.tokenizer import Tokenizer
from tests.support.sparse import bytes_in_page_cache, bytes_read_by_calls, write_released

VISION = "shards/vision.safetensors"


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    init_checkpoint(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def split(whole: Path) -> Path:
    out = whole.parent / "split"
    split_checkpoint(whole, out)
    return out


def rewrite(file: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def what_is_wrong(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        verify_split(folder)
    return str(error.value)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_loads_from_its_own_file_as_from_the_checkpoint(
    whole: Path, split: Path, component: Component
) -> None:
    expected = load_shard(whole, component).state_dict()
    for other in set(COMPONENTS) - {component}:
        (split / "shards" / f"{other}.safetensors").unlink()

    loaded = load_shard(split, component).state_dict()

    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_all_that_a_pipeline_reads_is_there(whole: Path, split: Path) -> None:
    assert load_config(split) == load_config(whole) == TINY
    assert inspect(split) == inspect(whole)
    assert Tokenizer.load(split).encode("hi") == Tokenizer.load(whole).encode("hi")
    voice, same = load_voice(split), load_voice(whole)
    assert voice is not None and same is not None
    assert torch.equal(voice.prompt_mel, same.prompt_mel)
    assert load_ref_audio(split) is not None
    check(split, COMPONENTS)


def test_the_files_are_safetensors_for_everyone(whole: Path, split: Path) -> None:
    main = load_file(whole / "model.safetensors")
    stored = load_file(split / VISION)
    assert stored.keys() == {name for name in main if name.startswith(PREFIXES["vision"])}
    assert all(torch.equal(tensor, main[name]) for name, tensor in stored.items())


def test_a_split_is_the_same_each_time_and_can_be_split_again(whole: Path, split: Path, tmp_path: Path) -> None:
    assert split_checkpoint(whole, tmp_path / "again") == verify_split(split)
    assert split_checkpoint(split, tmp_path / "of the split") == verify_split(split)


def test_the_manifest_tells_every_file_and_every_tensor(split: Path) -> None:
    manifest = verify_split(split)

    files = {path.relative_to(split).as_posix() for path in split.rglob("*") if path.is_file()}
    assert files == {*manifest, "manifest.json"}
    for name, record in manifest.items():
        assert record.num_bytes == (split / name).stat().st_size
    tensors = manifest[VISION].tensors
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        name: ("F32", tuple(tensor.shape)) for name, tensor in load_file(split / VISION).items()
    }


def test_tensors_of_any_dtype_are_copied_bit_by_bit(whole: Path, tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in load_file(whole / "model.safetensors").items()}
    odd = {
        "llm.odd.int8": torch.tensor([-1, 2, 3], dtype=torch.int8),
        "llm.odd.bool": torch.tensor([True, False, True]),
        "llm.odd.fp8": torch.tensor([1.5, -2.0], dtype=torch.float8_e4m3fn),
        "llm.odd.scalar": torch.tensor(7, dtype=torch.int64),
        "llm.odd.empty": torch.zeros(0, 3),
    }
    save_file(halves | odd, whole / "model.safetensors")

    split_checkpoint(whole, tmp_path / "split")

    verify_split(tmp_path / "split")
    stored = load_file(tmp_path / "split" / "shards" / "llm.safetensors")
    for name, tensor in odd.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
        assert stored[name].tolist() == tensor.tolist()
    assert torch.equal(stored["llm.lm_head.weight"], halves["llm.lm_head.weight"])


def test_a_changed_tensor_is_named(split: Path) -> None:
    query = load_file(split / VISION)["resampler.query"].clone()
    query[0, 0] += 1
    rewrite(split / VISION, {"resampler.query": query})
    message = what_is_wrong(split)
    assert "vision.safetensors: changed" in message
    assert message.endswith(" 1 tensors changed: resampler.query.")


def test_a_single_flipped_bit_is_named(split: Path) -> None:
    content = bytearray((split / VISION).read_bytes())
    content[-1] ^= 1
    (split / VISION).write_bytes(content)
    last = max(load_file(split / VISION))  # equal dtypes: by name
    assert f"1 tensors changed: {last}." in what_is_wrong(split)


def test_a_cut_off_file_names_the_tensors_that_it_lacks(split: Path) -> None:
    content = (split / VISION).read_bytes()
    (split / VISION).write_bytes(content[:-4])
    message = what_is_wrong(split)
    assert f"vision.safetensors: changed, {len(content) - 4} bytes instead of {len(content)}." in message
    assert f"1 tensors cut off: {max(read_manifest(split)[VISION].tensors)}." in message
    with pytest.raises(ModelError, match=r"vision\.safetensors: not a whole safetensors file"):
        load_shard(split, "vision")


def test_a_missing_an_extra_and_a_reshaped_tensor_are_named(split: Path) -> None:
    bias = load_file(split / VISION)["vpm.post_layernorm.bias"]
    changes = {
        "resampler.query": None,
        "vpm.surprise": torch.zeros(2),
        "vpm.post_layernorm.bias": bias.clone().view(1, -1),
        "vpm.post_layernorm.weight": bias.half(),
    }
    rewrite(split / VISION, changes)
    message = what_is_wrong(split)
    assert "1 tensors missing: resampler.query." in message
    assert "1 tensors extra: vpm.surprise." in message
    assert "vpm.post_layernorm.bias is F32 (1, 32) instead of F32 (32,)" in message
    assert "vpm.post_layernorm.weight is F16 (32,) instead of F32 (32,)" in message
    assert "audio" not in message


def test_missing_and_extra_files_are_named(split: Path) -> None:
    (split / "shards" / "llm.safetensors").unlink()
    (split / "shards" / "more.safetensors").write_bytes(b"")
    (split / "config.json").write_text(json.dumps(json.loads((split / "config.json").read_text())))
    message = what_is_wrong(split)
    assert "1 files missing: shards/llm.safetensors." in message
    assert "1 files extra: shards/more.safetensors." in message
    assert "config.json: changed, " in message


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a": {}}'])
def test_a_file_that_is_something_else_is_named(split: Path, content: bytes) -> None:
    (split / VISION).write_bytes(content)
    assert "vision.safetensors: " in what_is_wrong(split)


def test_a_changed_header_is_told_even_if_the_tensors_are_whole(split: Path) -> None:
    content = (split / VISION).read_bytes()
    (split / VISION).write_bytes(content.replace(b'"format":"pt"', b'"format":"tf"'))
    assert "vision.safetensors: changed. Its tensors are whole." in what_is_wrong(split)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not the manifest of a split checkpoint"),
        ("[]", "not the manifest of a split checkpoint"),
        ('{"files": {"config.json": {}}}', "not the manifest of a split checkpoint"),
        ('{"files": {"../config.json": {"bytes": 1, "sha256": ""}}}', "not the name of a file in this folder"),
        ('{"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}', "not the name of a file in this folder"),
    ],
)
def test_a_bad_manifest_is_refused(split: Path, content: str, message: str) -> None:
    (split / "manifest.json").write_text(content)
    assert message in what_is_wrong(split)


def test_a_folder_without_a_manifest_is_refused(whole: Path) -> None:
    assert "`pipeline shards split` writes one" in what_is_wrong(whole)


def test_nothing_is_left_out_silently_and_nothing_written_over(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exists and is not an empty folder"):
        split_checkpoint(whole, whole)
    rewrite(whole / "model.safetensors", {"moe.router.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"1 stray: moe\.router\.weight"):
        split_checkpoint(whole, tmp_path / "split")
    assert not (tmp_path / "split").exists()


def test_weights_and_code_are_not_copied_but_what_is_beside_them_is(whole: Path, tmp_path: Path) -> None:
    for name in ("modeling.py", ".cache/x.json", "assets/ref.wav", "assets/token2wav/campplus.onnx", "extra.bin"):
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_bytes(b"x")
    manifest = split_checkpoint(whole, tmp_path / "split")
    assert {"assets/ref.wav", "assets/token2wav/campplus.onnx", "assets/token2wav/prompt.safetensors"} <= set(manifest)
    assert not {"modeling.py", ".cache/x.json", "extra.bin", "model.safetensors"} & set(manifest)


# --- the two released vocoders ----------------------------------------------------------------------------------------


def release_vocoder(folder: Path, *, causal: bool) -> None:
    """Give a checkpoint a vocoder of the released files and sizes, though all zeros, which share one in each file.

    1.0.5 and 1.0.6: flow.yaml, flow.pt, hift.pt. 1.0.7: config.yaml and hift_original.pt, too.
    """
    assets = folder / VOCODER_FOLDER
    for name in ("config.json", "flow.safetensors", "hift.safetensors"):
        (assets / name).unlink()
    with torch.device("meta"):
        flow, original = Flow(FlowConfig()), HiftGenerator(HiftConfig())
        hift = CausalHiftGenerator(HiftConfig(causal=True)) if causal else original
    modules = {"flow.pt": flow, "hift.pt": hift} | ({"hift_original.pt": original} if causal else {})
    for name, module in modules.items():
        torch.save({key: torch.zeros(()).expand(t.shape) for key, t in module.state_dict().items()}, assets / name)
    (assets / "flow.yaml").write_text("flow: {}")
    if causal:
        (assets / "config.yaml").write_text("vocoder: {}")


@pytest.mark.parametrize("causal", [False, True])
def test_the_files_tell_which_vocoder_was_released(whole: Path, causal: bool) -> None:
    release_vocoder(whole, causal=causal)
    vocoder = load_config(whole).vocoder
    assert vocoder is not None and vocoder.hift.causal == causal
    check(whole, ["vocoder"])


@pytest.mark.parametrize("causal", [False, True])
def test_a_split_says_which_vocoder_it_has(whole: Path, tmp_path: Path, causal: bool) -> None:
    release_vocoder(whole, causal=causal)
    for part in ("flow", "hift"):  # small ones do for that
        torch.save({f"{part}_weight": torch.ones(2)}, whole / VOCODER_FOLDER / f"{part}.pt")

    split_checkpoint(whole, tmp_path / "split")

    verify_split(tmp_path / "split")
    assert load_config(tmp_path / "split").vocoder == load_config(whole).vocoder
    stored = load_file(tmp_path / "split" / "shards" / "vocoder.safetensors")
    assert set(stored) == {"flow.flow_weight", "hift.hift_weight"}  # the HiFT of before is nobody's


def test_the_vocoder_of_one_release_is_not_taken_for_that_of_the_other(whole: Path) -> None:
    release_vocoder(whole, causal=True)
    (whole / VOCODER_FOLDER / "hift_original.pt").unlink()
    with pytest.raises(ModelError, match=r"hift\.conv_pre\.\S+ is \(512, 80, 5\), the config wants \(512, 80, 7\)"):
        check(whole, ["vocoder"])


# --- bytes read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["audio", "tts"])
def test_a_component_of_full_size_reads_its_own_bytes_only(tmp_path: Path, component: Component) -> None:
    """Of a file of 18.7 GB, mapped: what of it comes into memory, and what is read by calls."""
    write_released(tmp_path / "released")
    main = tmp_path / "released" / "model.safetensors"
    own = {info.component: info.num_bytes for info in inspect(tmp_path / "released")}[component]
    assert main.stat().st_size > 18_700_000_000
    before = bytes_read_by_calls()

    load_shard(tmp_path / "released", component, dtype=torch.float16)  # stored as bfloat16: each weight is read

    touched = bytes_in_page_cache(main) + bytes_read_by_calls() - before
    # The header is 180 kB. The kernel reads ahead, some MB past the end of a run of tensors.
    assert 0.9 * own < touched < 1.1 * own  # the talker has 8 % that inference never touches


def test_the_vocoder_reads_nothing_of_the_main_file(tmp_path: Path) -> None:
    write_released(tmp_path / "released")
    main = tmp_path / "released" / "model.safetensors"
    before = bytes_in_page_cache(main)
    load_shard(tmp_path / "released", "vocoder", dtype=torch.float16)
    assert bytes_in_page_cache(main) == before < 1_000_000


def test_headers_are_all_that_looking_costs(tmp_path: Path) -> None:
    write_released(tmp_path / "released")
    main = tmp_path / "released" / "model.safetensors"
    assert sum(info.num_parameters for info in inspect(tmp_path / "released") if info.component != "vocoder") == (
        9_356_548_162
    )
    check(tmp_path / "released", COMPONENTS)
    assert bytes_in_page_cache(main) < 1_000_000
