"""What components take of a device's memory: weights, what each session keeps there, and what a batch works with.

Rule: weights and sessions are reckoned from the config, to the byte; workspaces are estimates, from the widest tensors
of a layer, and no measurement on a GPU stands behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from model_shards.checkpoint import Component, build_hollow
from model_shards.config import AudioConfig, LlmConfig, ModelConfig, TtsConfig, VisionConfig, VocoderConfig
from model_shards.flow import CONV_HISTORY, HISTORY_FRAMES, WINDOW_CODES
from model_shards.kv_cache import KvShape
from model_shards.tts_paged import shape_of

LEAST_WORKSPACE: Final = 128 << 20  # libraries have buffers of their own
VOICE_FRAMES: Final = 300  # of a reference voice of 6 seconds
PATCHES: Final = 1024  # of a cell of 448 x 448
SAMPLES: Final = 24_000  # of a window of speech
ROWS: Final = 64  # of a second of sound in the encoder; more than the talker's condition has
PARTS: Final = 4  # inputs, outputs and two more are there at once of what a layer makes


@dataclass(frozen=True, slots=True)
class Use:
    """How a stage uses its component. batch: sessions at once. unit_tokens: that a unit brings the LLM at most.

    copied_tokens: of each session, whose keys and values a decode step copies, layer by layer (attention sdpa).
    resident: sessions with a place of their own on the device.
    """

    batch: int
    unit_tokens: int = 0
    copied_tokens: int = 0
    resident: int = 0


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
        new = vocoder.flow.up_stride * WINDOW_CODES
        encoder = _encoder_frame_bytes(vocoder) * (HISTORY_FRAMES + new)
        dit = _dit_frame_bytes(vocoder) * (max(HISTORY_FRAMES, voice_frames) + new)
        return encoder + dit + _conv_bytes(vocoder)
    return 0


def shared_bytes(
    component: Component, config: ModelConfig, dtype: torch.dtype, voice_frames: int, is_resident: bool
) -> int:
    """What all sessions of a replica have together: the voice, as the vocoder has heard it, and once more where turns
    are resident; and the slot of the audio encoder that no session has."""
    if component == "vocoder" and config.vocoder is not None:
        frame = _encoder_frame_bytes(config.vocoder) + _dit_frame_bytes(config.vocoder)
        return frame * voice_frames * (2 if is_resident else 1)
    return session_bytes("audio", config, dtype, 0) if component == "audio" and is_resident else 0


def kv_token_bytes(config: LlmConfig, dtype: torch.dtype) -> int:
    """Of the LLM's pool."""
    return KvShape.of(config).bytes_per_token(dtype)


def workspace_bytes(component: Component, config: ModelConfig, dtype: torch.dtype, use: Use) -> int:
    """An estimate of what a batch of so many sessions works with."""
    part = {
        "llm": config.llm,
        "vision": config.vision,
        "audio": config.audio,
        "tts": config.tts,
        "vocoder": config.vocoder,
    }[component]
    return LEAST_WORKSPACE if part is None else LEAST_WORKSPACE + _batch_bytes(part, dtype, use)


def _batch_bytes(
    part: LlmConfig | VisionConfig | AudioConfig | TtsConfig | VocoderConfig, dtype: torch.dtype, use: Use
) -> int:
    match part:
        case LlmConfig():
            rows, width = use.batch * use.unit_tokens, part.hidden_size + part.intermediate_size
            logits = use.batch * part.vocab_size * 4
            # A quantised matrix is written out while it is computed with.
            matrix = part.hidden_size * part.intermediate_size if part.quantization is not None else 0
            copied = use.batch * use.copied_tokens * kv_token_bytes(part, dtype) // part.num_hidden_layers
            return PARTS * rows * width * dtype.itemsize + 2 * logits + matrix * dtype.itemsize + copied
        case VisionConfig():
            cells = min(use.batch * part.slices.max_slice_nums, part.vision_batch_size)
            return PARTS * cells * PATCHES * (part.hidden_size + part.intermediate_size) * dtype.itemsize
        case AudioConfig():
            # The keys and values of all sessions are stacked, layer by layer.
            stacked = 2 * use.batch * part.max_source_positions * part.d_model
            return (stacked + PARTS * use.batch * ROWS * (part.d_model + part.encoder_ffn_dim)) * dtype.itemsize
        case TtsConfig():
            layer = PARTS * ROWS * (part.hidden_size + part.intermediate_size) * dtype.itemsize
            copied = use.copied_tokens * shape_of(part).bytes_per_token(dtype) // part.num_hidden_layers
            return use.batch * (layer + copied + PARTS * part.num_audio_tokens * 4)
        case VocoderConfig():
            return _vocoder_batch_bytes(part, use)


def _vocoder_batch_bytes(config: VocoderConfig, use: Use) -> int:
    """The history of one Euler step is gathered; of what is resident, that of one layer. HiFT's widest layer is at the
    full rate of its last stage."""
    flow = config.flow
    new = flow.up_stride * WINDOW_CODES
    step = _dit_frame_bytes(config) // config.num_steps * (VOICE_FRAMES + HISTORY_FRAMES + new)
    wave = PARTS * 4 * SAMPLES // config.hift.istft_hop_len * config.hift.base_channels // 8
    num_resident = min(use.batch, use.resident)
    gathered = num_resident * step // flow.dit_depth + (use.batch - num_resident) * step
    return gathered + use.batch * (wave + PARTS * 4 * 2 * new * 2 * flow.dit_hidden_size * 4)


def _dit_frame_bytes(config: VocoderConfig) -> int:
    """A mel frame in the history of the DiT, in float32, with and (where there is guidance) without condition."""
    flow = config.flow
    return 4 * config.num_steps * flow.dit_depth * 2 * _branches(config) * flow.dit_num_heads * flow.dit_head_dim


def _encoder_frame_bytes(config: VocoderConfig) -> int:
    flow = config.flow
    blocks = flow.encoder_num_up_blocks * flow.up_stride + flow.encoder_num_blocks
    return 4 * 2 * flow.input_size * blocks // flow.up_stride


def _conv_bytes(config: VocoderConfig) -> int:
    """What the convolutions remember of a turn, in float32."""
    flow = config.flow
    encoder = flow.input_size * (CONV_HISTORY + 2 * flow.up_stride)
    dit = config.num_steps * flow.dit_depth * _branches(config) * 2 * flow.dit_hidden_size * CONV_HISTORY
    return 4 * (encoder + dit)


def _branches(config: VocoderConfig) -> int:
    return 2 if config.flow.inference_cfg_rate > 0 else 1
