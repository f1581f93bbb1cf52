"""What components take of a device's memory: weights, what each session keeps there, and what a batch works with.

Rule: weights and sessions are reckoned from the config, to the byte; workspaces are estimates, from the widest tensors
of a layer, and no measurement on a GPU stands behind them.
"""

from __future__ import annotations

from typing import Final

import torch

from model_shards.checkpoint import Component, build_hollow
from model_shards.config import AudioConfig, LlmConfig, ModelConfig, TtsConfig, VisionConfig, VocoderConfig
from model_shards.flow import HISTORY_FRAMES
from model_shards.kv_cache import KvShape

LEAST_WORKSPACE: Final = 128 << 20  # libraries have buffers of their own
CHUNK_FRAMES: Final = 100  # mel frames of two windows: a chunk is there twice while it is appended
VOICE_FRAMES: Final = 300  # of a reference voice of 6 seconds
PATCHES: Final = 1024  # of a cell of 448 x 448
SAMPLES: Final = 24_000  # of a window of speech
PARTS: Final = 4  # inputs, outputs and two more are there at once of what a layer makes


def weight_bytes(component: Component, config: ModelConfig, dtype: torch.dtype) -> int:
    """Of a component as it is loaded; codes of quantised weights stay as they are, and the vocoder's are float32."""
    item = 4 if component == "vocoder" else dtype.itemsize
    tensors = build_hollow(component, config).state_dict().values()
    return sum(t.numel() * (item if t.is_floating_point() else t.dtype.itemsize) for t in tensors)


def session_bytes(component: Component, config: ModelConfig, dtype: torch.dtype, voice_frames: int) -> int:
    """What a session keeps at most, beside the LLM's pool. voice_frames: mel frames of the voice's prompt."""
    if component == "audio" and (audio := config.audio) is not None:
        return audio.encoder_layers * 2 * audio.d_model * audio.max_source_positions * dtype.itemsize
    if component == "tts" and (tts := config.tts) is not None:
        head_dim = tts.hidden_size // tts.num_attention_heads
        token = tts.num_hidden_layers * 2 * tts.num_key_value_heads * head_dim * dtype.itemsize
        return token * tts.max_position_embeddings
    if component == "vocoder" and (vocoder := config.vocoder) is not None:
        return _frame_bytes(vocoder) * (max(HISTORY_FRAMES, voice_frames) + HISTORY_FRAMES + CHUNK_FRAMES)
    return 0


def shared_bytes(component: Component, config: ModelConfig, voice_frames: int) -> int:
    """What all sessions of a replica have together: the voice, as the vocoder has heard it."""
    if component == "vocoder" and config.vocoder is not None:
        return _frame_bytes(config.vocoder) * voice_frames
    return 0


def kv_token_bytes(config: LlmConfig, dtype: torch.dtype) -> int:
    """Of the LLM's pool."""
    return KvShape.of(config).bytes_per_token(dtype)


def workspace_bytes(component: Component, config: ModelConfig, dtype: torch.dtype, batch: int, unit_tokens: int) -> int:
    """An estimate of what a batch of so many sessions works with. unit_tokens: that a unit brings the LLM at most."""
    part = {
        "llm": config.llm,
        "vision": config.vision,
        "audio": config.audio,
        "tts": config.tts,
        "vocoder": config.vocoder,
    }[component]
    return LEAST_WORKSPACE if part is None else LEAST_WORKSPACE + _batch_bytes(part, dtype, batch, unit_tokens)


def _batch_bytes(
    part: LlmConfig | VisionConfig | AudioConfig | TtsConfig | VocoderConfig,
    dtype: torch.dtype,
    batch: int,
    unit_tokens: int,
) -> int:
    match part:
        case LlmConfig():
            rows, width = batch * unit_tokens, part.hidden_size + part.intermediate_size
            logits = batch * part.vocab_size * 4
            # A quantised matrix is written out while it is computed with.
            matrix = part.hidden_size * part.intermediate_size if part.quantization is not None else 0
            return PARTS * rows * width * dtype.itemsize + 2 * logits + matrix * dtype.itemsize
        case VisionConfig():
            cells = min(batch * part.slices.max_slice_nums, part.vision_batch_size)
            return PARTS * cells * PATCHES * (part.hidden_size + part.intermediate_size) * dtype.itemsize
        case AudioConfig():
            # The keys and values of all sessions are stacked, layer by layer.
            stacked = 2 * batch * part.max_source_positions * part.d_model
            return (stacked + PARTS * batch * 64 * (part.d_model + part.encoder_ffn_dim)) * dtype.itemsize
        case TtsConfig():
            rows = part.max_position_embeddings * part.num_hidden_layers * 2 * part.hidden_size
            return rows * dtype.itemsize * batch
        case VocoderConfig():
            flow = part.flow
            # The history of one Euler step is gathered; HiFT's widest layer is at the full rate of its last stage.
            step = _frame_bytes(part) // max(part.num_steps, 1) * (VOICE_FRAMES + HISTORY_FRAMES + CHUNK_FRAMES)
            wave = PARTS * 4 * SAMPLES // part.hift.istft_hop_len * part.hift.base_channels // 8
            return batch * (step + wave + PARTS * 4 * CHUNK_FRAMES * 2 * flow.dit_hidden_size * 4)


def _frame_bytes(config: VocoderConfig) -> int:
    """A mel frame in the flow's history, in float32: encoder and DiT, the latter with and without condition."""
    flow = config.flow
    dit = config.num_steps * flow.dit_depth * 2 * 2 * flow.dit_num_heads * flow.dit_head_dim
    encoder = 2 * flow.input_size * (flow.encoder_num_up_blocks + flow.encoder_num_blocks // flow.up_stride)
    return 4 * (dit + encoder)
