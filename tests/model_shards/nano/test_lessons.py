"""A lesson holds what a session would have seen, heard and should have said."""

import numpy as np
import pytest
import torch

from model_shards.audio import AudioEncoder, AudioState
from model_shards.mel import StreamingMel
from model_shards.nano.clips import load_bank
from model_shards.nano.lessons import NUM_HINTS, Senses, embed_sound, from_tokens, teach, to_tokens
from model_shards.nano.oracle import LISTEN, Oracle, Speak
from model_shards.nano.sizes import AUDIO, VISION
from model_shards.nano.vocabulary import build_tokenizer
from model_shards.nano.world import NS_PER_S, Episode, plan_episode
from model_shards.vision import VisionEncoder

TOKENIZER = build_tokenizer()
SPECIAL = TOKENIZER.special


@pytest.fixture(scope="module")
def audio() -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(AUDIO).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def senses(audio: AudioEncoder) -> Senses:
    torch.manual_seed(0)
    return Senses(VisionEncoder(VISION).eval(), audio, load_bank("room"), seed=1)


def busy(senses: Senses) -> Episode:
    return plan_episode(3, 20 * NS_PER_S, "busy", senses.bank.duration_ns)


def test_sound_is_embedded_as_the_stream_is_also_beyond_the_encoders_reset(audio: AudioEncoder):
    samples = np.random.default_rng(0).normal(0, 0.1, 32 * 16000).astype(np.float32)
    mel, state, streamed = StreamingMel(), AudioState(), []
    for second in np.split(samples, 32):
        streamed += [audio.encode([(state, chunk)])[0] for chunk in mel.push(second, max_chunks=1)]
    assert torch.allclose(embed_sound(audio, samples), torch.stack(streamed), atol=2e-3)


def test_what_is_to_be_said_are_the_oracles_words_in_the_engines_tokens(senses: Senses):
    lesson, oracle = teach(busy(senses), senses, TOKENIZER), Oracle()
    expected = [to_tokens(oracle.step(window), TOKENIZER) for window in lesson.windows]
    assert list(lesson.labels) == expected
    assert any(label[0] == SPECIAL.speak for label in lesson.labels)


def test_each_unit_has_its_picture_its_sound_and_its_hints(senses: Senses):
    lesson = teach(busy(senses), senses, TOKENIZER)
    assert lesson.embedded.images.shape == (20, VISION.query_num, VISION.embed_dim)
    assert lesson.embedded.audio.shape == (20, 10, AUDIO.embed_dim)
    assert lesson.hints.shape == (20, NUM_HINTS)
    assert [len(unit.said) for unit in lesson.units()] == [len(label) for label in lesson.labels]


@pytest.mark.parametrize("output", [LISTEN, Speak(("a", "dog"), False), Speak((), True), Speak(("came", "in"), True)])
def test_tokens_say_what_the_oracle_said(output: Speak):
    tokens = to_tokens(output, TOKENIZER)
    ends = SPECIAL.turn_eos in tokens
    assert from_tokens(tokens == (SPECIAL.listen,), tokens[1:-1], ends, TOKENIZER) == output
