"""The shipped spoken requests."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from model_shards.nano.clips import CLIPS_FILE, Cast, load_bank, write_clips
from model_shards.nano.phrases import REQUESTS
from model_shards.nano.sounds import NS_PER_S, RATE_HZ, SPEECH_LEVEL
from model_shards.nano.voices import ACCENTS, EVALUATION, ROOM, VARIANTS


@pytest.mark.parametrize("cast", ["room", "evaluation"])
def test_every_request_is_there_at_one_level_and_of_a_natural_length(cast: Cast) -> None:
    bank = load_bank(cast)
    for request in REQUESTS:
        for clip_seed in range(6):
            clip = bank.clip(request, clip_seed)
            assert clip.dtype == np.float32
            assert 0.3 < len(clip) / RATE_HZ < 2.2
            assert np.sqrt(np.mean(clip**2)) == pytest.approx(SPEECH_LEVEL, rel=0.1)
            assert bank.duration_ns(request, clip_seed) == len(clip) * NS_PER_S // RATE_HZ


def test_a_seed_chooses_voice_and_speed() -> None:
    bank = load_bank("room")
    np.testing.assert_array_equal(bank.clip("stop", 4), bank.clip("stop", 4))
    assert len({bank.duration_ns("stop", clip_seed) for clip_seed in range(20)}) > 10


def test_the_clips_are_small_enough_to_ship() -> None:
    assert CLIPS_FILE.stat().st_size < 1_500_000


def test_who_is_shipped_is_never_trained_on() -> None:
    shipped = {voice.variant for voice in (*ROOM, *EVALUATION)}
    assert len(shipped) == len(ROOM) + len(EVALUATION)
    assert not shipped & set(VARIANTS)
    assert sum(voice.accent not in ACCENTS for voice in EVALUATION) == 2


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_the_shipped_clips_are_what_the_casts_say(tmp_path: Path) -> None:
    again = tmp_path / "again.npz"
    write_clips(again)
    with np.load(CLIPS_FILE) as shipped, np.load(again) as spoken:
        assert set(shipped.files) == set(spoken.files)
        assert {name: len(shipped[name]) for name in shipped.files} == {
            name: len(spoken[name]) for name in spoken.files
        }
