"""An untrained checkpoint in the released file layout, so that all machinery can be tried without a download.

Rule: a weight depends on the seed and on its own name only, so that the same seed gives the same checkpoint whatever
else is in it. Weights are drawn so that activations keep their scale; then a few channels of the language model are set
so that it listens, speaks for a few units and ends its turns, greedy or sampling. What it says is the alphabet.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from model_shards.checkpoint import VOCODER_FOLDER, Component, build_hollow, save_voice
from model_shards.config import (
    AudioConfig,
    FlowConfig,
    HiftConfig,
    LlmConfig,
    ModelConfig,
    TtsConfig,
    VisionConfig,
    VocoderConfig,
)
from model_shards.errors import ModelError
from model_shards.tokenizer import ADDED_TOKENS, NUM_BYTES, Tokenizer, build_backend, byte_texts
from model_shards.vocoder import Voice

_NUM_TOKENS = NUM_BYTES + 1 + len(ADDED_TOKENS)  # bytes, <unk>, and the official added tokens

TINY = ModelConfig(
    llm=LlmConfig(
        vocab_size=_NUM_TOKENS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    vision=VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, embed_dim=128
    ),
    audio=AudioConfig(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, embed_dim=128),
    tts=TtsConfig(
        llm_dim=128,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_text_tokens=_NUM_TOKENS,
        audio_bos_token_id=NUM_BYTES + 1 + ADDED_TOKENS.index("<focus>"),
        text_eos_token_id=NUM_BYTES + 1 + ADDED_TOKENS.index("</perception>"),
    ),
    vocoder=VocoderConfig(
        flow=FlowConfig(
            input_size=32,
            encoder_attention_heads=2,
            encoder_linear_units=64,
            encoder_num_blocks=1,
            encoder_num_up_blocks=1,
            dit_hidden_size=32,
            dit_depth=1,
            dit_num_heads=2,
            dit_head_dim=8,
        ),
        hift=HiftConfig(
            base_channels=16,
            nb_harmonics=2,
            f0_cond_channels=16,
            resblock_kernel_sizes=(3, 7),
            resblock_dilation_sizes=((1, 3), (1, 3)),
            source_resblock_kernel_sizes=(7, 7, 7),
            source_resblock_dilation_sizes=((1,), (1,), (1,)),
        ),
        num_steps=5,
    ),
    untrained=True,
)
SIZES: Mapping[str, ModelConfig] = MappingProxyType({"tiny": TINY})

# The greedy model walks round this circle of characters, from wherever a unit starts it.
_CIRCLE = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ,0123456789."
# Channels of the LLM's hidden state which its layers leave alone. They say what kind of token came last, and how what
# was heard last falls on a random axis.
_HEARD, _MOOD, _SAID, _PAUSE, _STOP, _OVER = range(6)
_NUM_SIGNALS = 6
_SIGNAL = 4.0  # against about 1 in the other channels
_PULL = 3.0  # of a signal on a token's logit: after the norms about 7, as much as the circle's next character has
_MOOD_GAIN = 8.0  # moods then differ by about 2, so that neither listening nor speaking always wins
_SIGNAL_COLUMNS = ("llm.model.embed_tokens.weight", "llm.lm_head.weight", "resampler.proj")
_RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight")
# Looked up, not multiplied: drawn with the scale of activations.
_TABLES = (
    *("embed_tokens.weight", "position_embedding.weight", "embed_positions.weight", "resampler.query"),
    *("emb_text.weight", "emb_code.0.weight", "input_embedding.weight"),
)
_CONTRASTS: Mapping[str, float] = MappingProxyType(
    {
        "apm.embed_positions.weight": 3.0,  # even silence sounds different from second to second
        "self_attn.q_norm.weight": 3.0,  # what the LLM attends to changes with time, and so do its next words
        "hift.conv_post.parametrizations.weight.original0": 0.1,  # noise, but even noise
        "head_code.0.parametrizations.weight.original0": 3.0,  # the best speech code is well apart from the next
    }
)
_LOUDNESS = 1.0  # logarithm of the magnitudes in untrained speech: a murmur
_VOICE_SAMPLES = 16000
_VOICE_TOKENS = 25


def init_checkpoint(out: Path, size: str = "tiny", seed: int = 0) -> None:
    """Write an untrained checkpoint folder; it appears whole or not at all.

    Raises ModelError when `size` is unknown, or `out` exists and is not an empty folder.
    """
    if size not in SIZES:
        raise ModelError(f"there is no size {size!r}; there are: {', '.join(SIZES)}")
    with new_folder(out) as folder:
        _write_checkpoint(folder, SIZES[size], seed)


def _write_checkpoint(folder: Path, config: ModelConfig, seed: int) -> None:
    tokenizer = _byte_tokenizer()
    tokenizer.save(folder)
    _write_json(folder / "config.json", official_config(config))
    weights: dict[str, Tensor] = {}
    for component in ("vision", "audio", "llm", "tts"):
        weights |= _draw_component(component, config, seed)
    _shape_dialogue(weights, tokenizer)
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    if config.vocoder is not None:
        (folder / VOCODER_FOLDER).mkdir(parents=True)
        _write_vocoder(folder, config, config.vocoder, seed)


def _write_vocoder(folder: Path, config: ModelConfig, vocoder: VocoderConfig, seed: int) -> None:
    weights = _draw_component("vocoder", config, seed)
    weights["hift.conv_post.bias"][: vocoder.hift.istft_n_fft // 2 + 1] = _LOUDNESS
    for part in ("flow", "hift"):
        tensors = {name: tensor for name, tensor in weights.items() if name.startswith(f"{part}.")}
        (folder / VOCODER_FOLDER / f"{part}.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    _write_json(folder / VOCODER_FOLDER / "config.json", vocoder_sizes(vocoder))
    save_voice(folder, _draw_voice(vocoder.flow, seed), _reference_tone())


def vocoder_sizes(config: VocoderConfig) -> dict[str, Any]:
    """The content of an `assets/token2wav/config.json` that is read as `config`."""
    return asdict(config)


def official_config(config: ModelConfig) -> dict[str, Any]:
    """The content of a `config.json` that `parse_config` reads as `config`; all components must be switched on."""
    assert config.vision is not None and config.audio is not None and config.tts is not None
    vision, audio = asdict(config.vision), asdict(config.audio)
    return {
        "model_type": "minicpmo",
        "architectures": ["MiniCPMO"],
        "version": "4.5",
        **asdict(config.llm),
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "image_size": config.vision.slices.scale_resolution,
        "drop_vision_last_layer": True,
        **{key: vision.pop(key) for key in ("query_num", "vision_batch_size", "resampler_head_dim")},
        "slice_config": vision.pop("slices"),
        "audio_pool_step": audio.pop("pool_step"),
        "audio_chunk_length": audio.pop("chunk_length_s"),
        "init_vision": True,
        "init_audio": True,
        "init_tts": True,
        "vision_config": vision | {"num_hidden_layers": config.vision.num_hidden_layers + 1},
        "audio_config": audio,
        "tts_config": asdict(config.tts),
        "generation": asdict(config.generation),
        "nano": config.nano,
        "untrained": config.untrained,
    }


def _byte_tokenizer() -> Tokenizer:
    """A token per byte, and the official added tokens."""
    texts = byte_texts()
    backend = build_backend({text: index for index, text in enumerate(texts.values())}, [], ["<unk>", *ADDED_TOKENS])
    return Tokenizer(backend, [index for index, byte in enumerate(texts) if chr(byte) not in _CIRCLE])


def _draw_component(component: Component, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    expected = build_hollow(component, config).state_dict()
    weights = {name: _draw(name, tensor.shape, seed) for name, tensor in expected.items()}
    for name in weights:
        if name.endswith(".original0"):  # the norms of weight norm: such that the effective weight is as drawn
            weights[name] = _norms(weights[name.removesuffix("0") + "1"])
        weights[name] *= math.prod(gain for suffix, gain in _CONTRASTS.items() if name.endswith(suffix))
    return weights


def _draw(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Draw one tensor: scales are 1, biases small, and a matrix keeps the scale of what it is multiplied with."""
    values = torch.randn(shape, generator=_generator(name, seed))
    last = name.rpartition(".")[2]
    if last == "alpha" or (last == "weight" and len(shape) == 1):
        return torch.ones(shape)
    if "bias" in last:
        return values * 0.02
    return values if name.endswith(_TABLES) else values / math.sqrt(math.prod(shape[1:]))


def _shape_dialogue(weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Let the model listen or speak as what it hears happens to fall, and end units and turns where the circle says."""
    embed, head = weights["llm.model.embed_tokens.weight"], weights["llm.lm_head.weight"]
    special = tokenizer.special
    circle, pauses = tokenizer.encode(_CIRCLE), tokenizer.encode(", ")
    stops = [*tokenizer.encode("."), special.tts_bos]  # the duplex loop makes a wish to listen in a turn a <|tts_bos|>
    head.zero_()
    head[circle[1:] + circle[:1]] = embed[circle] / math.sqrt(embed.shape[1])
    _free_signals(weights)
    weights["audio_projection_layer.linear2.bias"][_HEARD] = _SIGNAL
    pictures = [special.image_end, special.slice_end]  # without a sound, they are listened to
    embed[pictures, _HEARD], embed[pictures, _MOOD] = _SIGNAL, -1
    embed[[*circle, special.speak, special.tts_bos], _SAID] = _SIGNAL
    embed[pauses, _PAUSE] = _SIGNAL
    embed[stops, _STOP] = embed[special.turn_eos, _OVER] = _SIGNAL
    for token in (special.listen, special.speak):
        head[token, _HEARD], head[token, _SAID] = _PULL, -_PULL
    head[special.listen, _MOOD], head[special.speak, _MOOD] = -_PULL, _PULL
    head[special.turn_eos, _STOP] = head[special.chunk_eos, _OVER] = head[special.chunk_eos, _PAUSE] = 2 * _PULL


def _free_signals(weights: dict[str, Tensor]) -> None:
    """Let nothing read or write the channels of the signals."""
    projector = weights["audio_projection_layer.linear2.weight"]
    projector -= projector.mean(dim=1, keepdim=True)  # what all sounds have in common would decide everything
    mood = _MOOD_GAIN * projector[_MOOD]
    columns = [tensor for name, tensor in weights.items() if name in _SIGNAL_COLUMNS]
    rows = [tensor for name, tensor in weights.items() if name.startswith("llm.") and name.endswith(_RESIDUAL_WRITERS)]
    for matrix in (*rows, projector, weights["audio_projection_layer.linear2.bias"], *(m.T for m in columns)):
        matrix[:_NUM_SIGNALS] = 0
    projector[_MOOD] = mood


def _norms(weight: Tensor) -> Tensor:
    """Norm of each row, with the other dimensions kept as 1."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return norms


def _draw_voice(config: FlowConfig, seed: int) -> Voice:
    source = _generator("voice", seed)
    return Voice(
        prompt_tokens=torch.randint(config.vocab_size, (_VOICE_TOKENS,), generator=source, dtype=torch.int32),
        prompt_mel=torch.randn(1, 2 * _VOICE_TOKENS, config.output_size, generator=source) - 6,  # log of a quiet voice
        spk_emb=torch.randn(1, config.spk_embed_dim, generator=source),
    )


def _reference_tone() -> Tensor:
    """One second at 16 kHz."""
    seconds = torch.arange(_VOICE_SAMPLES) / _VOICE_SAMPLES
    return 0.1 * torch.sin(2 * math.pi * 220 * seconds)


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `out` when the block ends well, and disappears otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: exists and is not an empty folder; choose another, or remove it first")
    out = out.resolve()
    folder = out.parent / f".{out.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.replace(out)
    except OSError as error:
        raise ModelError(f"{out}: can't be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
