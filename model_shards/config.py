"""The sizes of a MiniCPM-o 4.5 checkpoint, parsed once from its `config.json` and frozen.

Rule: no other file reads `config.json`, and no other file carries a size of its own: each module takes its dataclass.
The defaults are the released values (vocabulary and token ids excepted, which come with the tokenizer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from model_shards.errors import ModelError
from model_shards.json_text import parse_json

T = TypeVar("T")
Decoding = Literal["greedy", "sampling"]

SILENCE_CODE = 4218  # of the released speech tokenizer


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers' weights are held (model_shards/quantized.py). bits: 8, or 4 in groups of `group_size`."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return "8 bits" if self.bits == 8 else f"4 bits in groups of {self.group_size}"


@dataclass(frozen=True, slots=True)
class LlmConfig:
    """Qwen3 decoder (`llm.`). quantization: of its layers; the head then has 8 bits. None: none."""

    vocab_size: int = 151748
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40960
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class SliceConfig:
    """How a picture is cut into cells."""

    max_slice_nums: int = 1
    patch_size: int = 14
    scale_resolution: int = 448


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """SigLIP tower (`vpm.`) and resampler (`resampler.`).

    `num_hidden_layers` counts the layers which the checkpoint holds: with `drop_vision_last_layer` one less than in
    `config.json`.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 980
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    query_num: int = 64
    embed_dim: int = 4096  # width of the LLM
    resampler_head_dim: int = 128  # heads of the resampler = embed_dim // this
    vision_batch_size: int = 16
    slices: SliceConfig = field(default_factory=SliceConfig)


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """Whisper encoder (`apm.`), projector (`audio_projection_layer.`) and pooling."""

    d_model: int = 1024
    encoder_layers: int = 24
    encoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    embed_dim: int = 4096  # width of the LLM
    pool_step: int = 5
    chunk_length_s: float = 1.0


@dataclass(frozen=True, slots=True)
class TtsConfig:
    """Talker (`tts.`): Llama backbone over speech codes."""

    llm_dim: int = 4096
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 20
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    max_position_embeddings: int = 4096
    num_audio_tokens: int = 6562  # the last one is EOS
    num_text_tokens: int = 152064
    audio_bos_token_id: int = 151687
    text_eos_token_id: int = 151692
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_type: str = "sliding_recompute"
    window_size: int = 2
    recomputed_chunks: int = 1
    sliding_window_tokens: int = 300
    top_p: float = 0.85
    top_k: int = 25
    repetition_penalty: float = 1.05
    temperature: float = 0.8
    normalize_projected_hidden: bool = True
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """Flow encoder and DiT of the vocoder (`assets/token2wav`, flow)."""

    vocab_size: int = 6561
    input_size: int = 512
    output_size: int = 80
    spk_embed_dim: int = 192
    encoder_attention_heads: int = 8
    encoder_linear_units: int = 2048
    encoder_num_blocks: int = 6
    encoder_num_up_blocks: int = 4
    pre_lookahead_len: int = 3
    up_stride: int = 2
    dit_hidden_size: int = 512
    dit_depth: int = 16
    dit_num_heads: int = 8
    dit_head_dim: int = 64
    dit_mlp_ratio: float = 4.0
    inference_cfg_rate: float = 0.7


@dataclass(frozen=True, slots=True)
class HiftConfig:
    """HiFT of the vocoder (`assets/token2wav`, hift). `causal` is the variant of minicpmo-utils 1.0.7 ("cv3")."""

    in_channels: int = 80
    base_channels: int = 512
    nb_harmonics: int = 8
    sampling_rate_hz: int = 24000
    nsf_alpha: float = 0.1
    nsf_sigma: float = 0.003
    nsf_voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_kernel_sizes: tuple[int, ...] = (16, 11, 7)
    istft_n_fft: int = 16
    istft_hop_len: int = 4
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_kernel_sizes: tuple[int, ...] = (7, 7, 11)
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    f0_cond_channels: int = 512
    causal: bool = False
    conv_pre_look_right: int = 4


@dataclass(frozen=True, slots=True)
class VocoderConfig:
    """Flow and HiFT; `num_steps` are the Euler steps (5: the released service; its library takes 10).

    silence_code: what a turn begins with. release: the minicpmo-utils whose streaming the flow was trained for; None:
    the one which released the checkpoint's HiFT.
    """

    flow: FlowConfig = field(default_factory=FlowConfig)
    hift: HiftConfig = field(default_factory=HiftConfig)
    num_steps: int = 5
    silence_code: int = SILENCE_CODE
    release: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How the checkpoint's duplex sessions decode and what they remember, where the user says nothing else.

    needs_pictures: it is lost where a window lacks its picture: overload should not take that away, and where there is
    none it is shown the last one again.
    The defaults are the official demo's. What they mean: `SamplingConfig` (decoding.py), `DuplexConfig` (duplex.py),
    `WindowConfig` (context.py).
    """

    decoding: Decoding = "sampling"  # of the talker, too
    repetition_penalty: float = 1.05
    length_penalty: float = 1.1
    listen_prob_scale: float = 1.0
    listen_means_im_end: bool = True
    max_text_chars: int | None = 28
    high_tokens: int = 4000
    low_tokens: int = 3500
    needs_pictures: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint. A component that is switched off (`init_vision: false` …) is None."""

    llm: LlmConfig = field(default_factory=LlmConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    audio: AudioConfig | None = field(default_factory=AudioConfig)
    tts: TtsConfig | None = field(default_factory=TtsConfig)
    vocoder: VocoderConfig | None = field(default_factory=VocoderConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    nano: bool = False  # trained by this project on its synthetic room (model_shards/nano)
    untrained: bool = False  # written by `pipeline shards init`: random weights, for trying the machinery
    official: bool = False  # it says that it is the released checkpoint


RELEASED = ModelConfig(vision=VisionConfig(slices=SliceConfig(max_slice_nums=9)), official=True)
"""The released checkpoint: reference/minicpmo-4.5.md §1."""

_NOT_COMPARED = frozenset(
    {
        # §12: the released values could not be read.
        *("tts.attention_type", "tts.window_size", "tts.recomputed_chunks", "tts.sliding_window_tokens"),
        *("tts.top_p", "tts.top_k", "tts.repetition_penalty", "tts.temperature", "tts.interleaved"),
        *("vocoder.hift.causal", "vocoder.num_steps", "vocoder.release"),  # two vocoders were released
        *("untrained", "official", "nano"),
    }
)

_PLAIN_ROPE = (None, {"rope_type": "default"}, {"type": "default"})
_BUILT_IN: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "model_type": ("minicpmo",),
        "version": ("4.5", 4.5),
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
        "rope_scaling": _PLAIN_ROPE,
        "use_sliding_window": (False,),
        "quantization_config": (None,),  # of another tool; ours writes `quantization`
        "vision_config.hidden_act": ("gelu_pytorch_tanh",),
        "audio_config.activation_function": ("gelu",),
        "audio_config.num_mel_bins": (80,),
        "tts_config.hidden_act": ("silu", "swish"),
        "tts_config.num_vq": (1,),
        "tts_config.projector_type": ("mlp",),
        "tts_config.condition_type": ("hidden_text_merge",),
        "tts_config.backbone_model": ("llama",),
        "tts_config.use_text": (True,),
        "tts_config.rope_scaling": _PLAIN_ROPE,
    }
)
"""What our modules are built for: where `config.json` says otherwise, they would compute something else."""


def load_config(path: Path) -> ModelConfig:
    """Parse `path/config.json`, and `path/assets/token2wav/config.json` where it exists.

    Where it doesn't, the vocoder is a released one, and the files beside it tell which.
    Raises ModelError when a file is missing, is not JSON, or is not a MiniCPM-o 4.5 config.
    """
    raw = _read_json(path / "config.json")
    folder = path / "assets" / "token2wav"
    written = (folder / "config.json").is_file()
    vocoder = _read_json(folder / "config.json") if written else _released_vocoder(folder)
    try:
        if foreign := _foreign(raw):
            raise ModelError(f"{path / 'config.json'}: not a model that is run here: {'; '.join(foreign)}")
        return parse_config(raw, vocoder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path / 'config.json'}: not a MiniCPM-o 4.5 config: {error!r}") from error


def parse_config(raw: Mapping[str, Any], vocoder: Mapping[str, Any]) -> ModelConfig:
    """Build the frozen config from the official nested dicts; absent keys take the released values."""
    raw = {**raw, **_rope(raw)}
    untrained, nano = bool(raw.get("untrained", False)), bool(raw.get("nano", False))
    official = raw.get("architectures") == ["MiniCPMO"] and str(raw.get("version")) == "4.5"
    hidden = int(raw.get("hidden_size", RELEASED.llm.hidden_size))
    return ModelConfig(
        llm=_parse_llm(raw),
        vision=_parse_vision(raw, hidden) if raw.get("init_vision", True) else None,
        audio=_parse_audio(raw, hidden) if raw.get("init_audio", True) else None,
        tts=_parse_tts(raw.get("tts_config", {})) if raw.get("init_tts", True) else None,
        vocoder=_parse_vocoder(vocoder) if raw.get("init_tts", True) else None,
        generation=_pick(GenerationConfig, raw.get("generation", {})),
        nano=nano,
        untrained=untrained,
        official=official and not untrained and not nano,
    )


def differences(config: ModelConfig) -> list[str]:
    """What is not as in the released checkpoint, like "llm.hidden_size is 128, released: 4096"; a component that is
    off is one difference. Which of the released vocoders it has is none."""
    return list(_differences(config, RELEASED, ""))


def _differences(config: Any, released: Any, prefix: str) -> Iterator[str]:
    for part in dataclasses.fields(released):
        name, ours, theirs = prefix + part.name, getattr(config, part.name), getattr(released, part.name)
        if name in _NOT_COMPARED or ours == theirs:
            continue
        if ours is None:
            yield f"{name} is off, released: on"
        elif dataclasses.is_dataclass(theirs):
            yield from _differences(ours, theirs, f"{name}.")
        else:
            yield f"{name} is {ours}, released: {theirs}"


def _foreign(raw: Mapping[str, Any]) -> list[str]:
    """What a config says that our modules would not obey."""
    settings = {**raw, **_rope(raw)}
    for section in ("vision_config", "audio_config", "tts_config"):
        settings |= {f"{section}.{key}": value for key, value in (raw.get(section) or {}).items()}
    return [
        f"{name} is {settings[name]!r}, expected {allowed[0]!r}"
        for name, allowed in _BUILT_IN.items()
        if name in settings and settings[name] not in allowed
    ]


def _released_vocoder(folder: Path) -> dict[str, Any]:
    """Which of the two released vocoders lies in a folder.

    minicpmo-utils 1.0.5 and 1.0.6 want flow.yaml, flow.pt and hift.pt. 1.0.7 also wants config.yaml and
    hift_original.pt, which is the HiFT of before; its hift.pt is the causal one (reference §1.6).
    """
    return {"hift": {"causal": (folder / "hift_original.pt").is_file()}}


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config which was saved by transformers 5."""
    parameters = dict(raw.get("rope_parameters") or {})
    theta = {"rope_theta": parameters.pop("rope_theta")} if "rope_theta" in parameters else {}
    return theta | ({"rope_scaling": parameters} if parameters else {})


def _parse_llm(raw: Mapping[str, Any]) -> LlmConfig:
    sizes = {key: value for key, value in raw.items() if key != "quantization"}
    if quantization := raw.get("quantization"):
        bits = int(quantization["bits"])
        if bits not in (8, 4):
            raise ValueError(f"quantization.bits is {bits}, expected 8 or 4")
        sizes["quantization"] = Quantization(bits, int(quantization["group_size"]))
    return _pick(LlmConfig, sizes)


def _parse_vision(raw: Mapping[str, Any], hidden: int) -> VisionConfig:
    sizes = dict(raw.get("vision_config", {}))
    if raw.get("drop_vision_last_layer", True):
        sizes["num_hidden_layers"] = sizes.get("num_hidden_layers", 27) - 1
    sizes |= {"embed_dim": hidden, "slices": _pick(SliceConfig, raw.get("slice_config") or {})}
    sizes |= {key: raw[key] for key in ("query_num", "vision_batch_size", "resampler_head_dim") if key in raw}
    return _pick(VisionConfig, sizes)


def _parse_audio(raw: Mapping[str, Any], hidden: int) -> AudioConfig:
    sizes = dict(raw.get("audio_config", {})) | {"embed_dim": hidden}
    sizes |= {"pool_step": raw.get("audio_pool_step", 5), "chunk_length_s": raw.get("audio_chunk_length", 1.0)}
    return _pick(AudioConfig, sizes)


def _parse_tts(raw: Mapping[str, Any]) -> TtsConfig:
    official = "streaming_sliding_window_audio_window_size"
    return _pick(TtsConfig, dict(raw) | ({"sliding_window_tokens": raw[official]} if official in raw else {}))


def _parse_vocoder(raw: Mapping[str, Any]) -> VocoderConfig:
    return VocoderConfig(
        flow=_pick(FlowConfig, raw.get("flow", {})),
        hift=_pick(HiftConfig, {key: _frozen(value) for key, value in raw.get("hift", {}).items()}),
        num_steps=int(raw.get("num_steps", 5)),
        silence_code=int(raw.get("silence_code", SILENCE_CODE)),
        release=raw.get("release"),
    )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _pick(kind: type[T], raw: Mapping[str, Any]) -> T:
    """Take the fields that `kind` knows; the official config carries many more."""
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in raw.items() if key in names})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; a checkpoint folder holds a config.json") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
