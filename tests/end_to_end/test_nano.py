"""What the shipped model does where it is at home: the default run, and a short evaluation with its floors."""

import json

import numpy as np
import pytest

from deploy.run.checkpoints import shipped
from model_shards.nano.phrases import remarks, sentences
from tests.support.pipeline import Place, Run

pytestmark = pytest.mark.ray

RATE_HZ = 24_000
FLOORS = {"recall": 0.8, "precision": 0.85, "question_accuracy": 0.5}
"""Below what these 3 episodes give (0.95, 1.0, 1.0): for a fall, not for a measurement."""
MOST = {"reaction_p95_s": 2.5, "false_per_10min": 13.0, "wer": 0.15, "unheard_max_s": 2.0}  # 98 quiet seconds: 6 each


@pytest.fixture(scope="module")
def by_default(place: Place) -> Run:
    """`make up`, for 20 seconds."""
    return place.up("--set", "model=nano", "--for", "20s")


@pytest.fixture(scope="module")
def evaluation(by_default: Run, place: Place) -> Run:
    """Three minutes in virtual time, where nothing is late however busy the machine is; and what its pipeline left."""
    run = place.run(
        "nano", "eval", "--episodes", "3", "--seed", "1", "--json", "--out", "eval", out="eval/whole/from-0"
    )
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def measured(evaluation: Run) -> dict[str, float]:
    return dict(json.loads(evaluation.stdout))


def test_the_checkpoint_is_small_and_has_its_card() -> None:
    files = [path for path in shipped().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40_000_000
    assert (shipped() / "MODEL_CARD.md").is_file()


def test_the_default_run_says_what_its_model_knows(by_default: Run) -> None:
    assert by_default.returncode == 0, by_default.stderr
    assert "model nano: trained on a synthetic room" in by_default.stderr
    assert "not as released" not in by_default.stderr


def test_within_20_seconds_something_is_remarked_aloud(by_default: Run) -> None:
    assert _spoken(by_default) & set(remarks())


def test_what_it_says_are_the_sentences_it_knows(evaluation: Run) -> None:
    assert _spoken(evaluation) <= set(sentences())
    assert len(_spoken(evaluation) & set(remarks())) > 3


def test_what_is_heard_is_in_the_wav(evaluation: Run) -> None:
    pieces = {session: evaluation.events(session, "heard") for session in _sessions(evaluation)}
    assert sum(map(len, pieces.values())) > 10
    for session, here in pieces.items():
        rate_hz, samples = evaluation.speech(session)
        assert rate_hz == RATE_HZ
        for heard in here:
            first, length = (round(heard[key] * RATE_HZ) for key in ("time_s", "seconds"))
            assert np.abs(samples[first : first + length]).max() > 1000, heard["text"]


def test_an_evaluation_stays_above_its_floors(measured: dict[str, float]) -> None:
    assert {name: measured[name] for name, floor in FLOORS.items() if measured[name] < floor} == {}


def test_an_evaluation_stays_below_its_ceilings(measured: dict[str, float | None]) -> None:
    values = {name: measured[name] for name in MOST}
    assert {name: value for name, value in values.items() if value is not None and value > MOST[name]} == {}


def _sessions(run: Run) -> set[str]:
    return {row["session"] for row in run.rows("windows.jsonl")}


def _spoken(run: Run) -> set[str]:
    return {text for session in _sessions(run) for text in _said(run, session)}


def _said(run: Run, session: str) -> list[str]:
    """Whole sentences; the end of the run may cut the last one off."""
    sentence, sentences = "", []
    for row in run.events(session, "said"):
        sentence += row["text"]
        if row["end_of_turn"]:
            sentences.append(sentence.strip())
            sentence = ""
    return sentences
