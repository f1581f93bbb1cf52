"""The sizes of nano: MiniCPM-o 4.5 in small, part by part."""

from __future__ import annotations

from typing import Final

from model_shards.config import AudioConfig, GenerationConfig, LlmConfig, SliceConfig, VisionConfig

EMBED_DIM: Final = 192
CELL_PX: Final = 112  # a picture's side at the vision encoder

VISION: Final = VisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    patch_size=14,
    image_size=112,
    query_num=16,
    embed_dim=EMBED_DIM,
    resampler_head_dim=32,
    slices=SliceConfig(max_slice_nums=1, patch_size=14, scale_resolution=CELL_PX),
)
AUDIO: Final = AudioConfig(
    d_model=128, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=512, embed_dim=EMBED_DIM
)
GENERATION: Final = GenerationConfig(
    decoding="greedy",
    repetition_penalty=1.0,
    length_penalty=1.0,
    max_text_chars=None,
    high_tokens=1500,
    low_tokens=1100,
    needs_pictures=True,
)
"""As `rehearsal` judges it, with a picture in each window. Its sentences repeat words; 1100 to 1500 tokens are the last
33 to 45 seconds."""


def llm_config(vocab_size: int) -> LlmConfig:
    """`vocab_size`: of the tokenizer that stands beside the checkpoint."""
    return LlmConfig(
        vocab_size=vocab_size,
        hidden_size=EMBED_DIM,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        rope_theta=10_000.0,
        max_position_embeddings=8192,
    )
