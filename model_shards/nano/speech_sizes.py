"""The sizes of nano's speech: talker, flow and HiFT of MiniCPM-o 4.5 in small."""

from __future__ import annotations

from typing import Final

from model_shards.config import FlowConfig, HiftConfig, TtsConfig, VocoderConfig
from model_shards.nano.sizes import EMBED_DIM
from model_shards.tokenizer import Tokenizer

CODE_DIGITS: Final = 6
CODE_LEVELS: Final = 3
NUM_CODES: Final = CODE_LEVELS**CODE_DIGITS
PROMPT_CODES: Final = 50  # so that what the streaming keeps of a prompt is all of it, always
CODES_PER_UNIT: Final = 25

FLOW: Final = FlowConfig(
    vocab_size=NUM_CODES,
    input_size=128,
    spk_embed_dim=16,
    encoder_attention_heads=4,
    encoder_linear_units=384,
    encoder_num_blocks=2,
    encoder_num_up_blocks=1,
    dit_hidden_size=128,
    dit_depth=4,
    dit_num_heads=4,
    dit_head_dim=32,
    dit_mlp_ratio=3.0,
    inference_cfg_rate=0.0,
)
HIFT: Final = HiftConfig(
    base_channels=128,
    upsample_rates=(4, 5),
    upsample_kernel_sizes=(8, 11),
    istft_n_fft=96,
    istft_hop_len=24,
    resblock_kernel_sizes=(3, 7),
    resblock_dilation_sizes=((1, 3), (1, 3)),
    source_resblock_kernel_sizes=(7, 7),
    source_resblock_dilation_sizes=((1,), (1,)),
    f0_cond_channels=64,
)


def vocoder_config(silence_code: int) -> VocoderConfig:
    """`silence_code`: see the speech tokenizer. Two Euler steps; the flow was trained with the tidier streaming."""
    return VocoderConfig(flow=FLOW, hift=HIFT, num_steps=2, silence_code=silence_code, release="1.0.7")


def talker_config(tokenizer: Tokenizer) -> TtsConfig:
    """The talker sees its whole turn and takes the likeliest code; where a seed is given, it hardly strays from it."""
    return TtsConfig(
        llm_dim=EMBED_DIM,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_audio_tokens=NUM_CODES + 1,
        num_text_tokens=len(tokenizer),
        audio_bos_token_id=tokenizer.id_of("<focus>"),
        text_eos_token_id=tokenizer.id_of("</perception>"),
        attention_type="full_attention",
        repetition_penalty=1.0,
        temperature=0.5,
    )
