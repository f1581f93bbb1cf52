from pathlib import Path

import numpy as np
import pytest
import torch

from model_shards.errors import DependencyError
from model_shards.nano.phrases import sentences, vocabulary
from model_shards.nano.speech_data import (
    build_corpus,
    corpus_sentences,
    held_out_sentences,
    load_corpus,
    nano_mel,
    nano_silence,
    pitch,
)
from model_shards.nano.teacher import CODE_SAMPLES, RATE_HZ, Speech, Teacher


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    try:
        return Teacher()
    except DependencyError as error:
        pytest.skip(str(error))


def test_what_is_held_out_is_never_learnt():
    assert not set(corpus_sentences(3000)) & set(held_out_sentences())
    assert not set(sentences()) & set(held_out_sentences())


def test_the_corpus_has_every_real_sentence_and_only_known_words():
    corpus = corpus_sentences(1000)
    assert len(corpus) == len(set(corpus)) == 1000
    assert set(sentences()) <= set(corpus)
    assert {word for sentence in corpus for word in sentence.split()} <= set(vocabulary())


def test_silence_is_the_lowest_mel():
    torch.testing.assert_close(nano_mel(torch.zeros(4800)), nano_silence(10))


def test_the_pitch_of_a_pulse_train_is_found():
    samples = np.zeros(RATE_HZ // 2, dtype=np.float32)
    samples[::120] = 0.5  # 200 Hz
    pitches = pitch(samples)
    assert len(pitches) == 25
    np.testing.assert_allclose(pitches[2:-2], 200, rtol=0.02)


def test_noise_and_silence_have_no_pitch():
    noise = np.random.default_rng(0).normal(0, 0.1, RATE_HZ // 2).astype(np.float32)
    assert (pitch(noise) > 0).mean() < 0.1
    assert not pitch(np.zeros(RATE_HZ // 2, dtype=np.float32)).any()


def test_the_teacher_speaks_whole_codes_and_tells_when_words_start(teacher: Teacher):
    speech = teacher.say("the dog is in the middle")
    assert len(speech.samples) == speech.num_codes * CODE_SAMPLES
    assert len(speech.starts_s) == len(speech.words) == 6
    assert list(speech.starts_s) == sorted(speech.starts_s)
    assert speech.starts_s[-1] < speech.num_codes / 25


def test_a_corpus_is_read_as_it_was_written(tmp_path: Path, teacher: Teacher):
    build_corpus(tmp_path, ["a dog came in", "the cat left"])
    corpus = load_corpus(tmp_path)
    first, second = corpus.utterances
    assert second.first_code == first.num_codes
    assert first.words == ("a", "dog", "came", "in")
    spoken: Speech = teacher.say("the cat left")
    assert corpus.mel_of(second).shape == (2 * spoken.num_codes, 80)
    assert len(corpus.wave[second.samples]) == len(spoken.samples)
    assert 100 < np.median([value for value in corpus.f0[second.frames] if value]) < 300
