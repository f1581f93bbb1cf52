"""TAIL at work: a pausing listener holds the text back, one who barges in is obeyed; in real and in virtual time."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from graph.ledger import REASONS
from tests.support.pipeline import Place, Run

pytestmark = pytest.mark.ray

NUM_WINDOWS = 15
LEAD_S, WINDOW_S = 1.0, 1.0
PAUSED_S, RESUMED_S = 4.0, 8.0
# When the second comes the window before has been heard for half a second; the last comes while one is worked on.
BARGE_INS_S = (10.5, 12.8, 14.05)
LISTENER = (
    *("--listener", f"paused@{PAUSED_S:g}s:{RESUMED_S:g}s"),
    *(text for time_s in BARGE_INS_S for text in ("--barge-in", f"{time_s:g}s")),
)
GREEDY = ("--set", "stages.llm.decoding=greedy", "--set", "stages.tts.decoding=greedy")
SAID_EDGES = {"llm.text->tts.text", "tts.codes->vocoder.codes", "vocoder.speech->speaker.speech"}


@pytest.fixture(scope="module")
def runs(place: Place, clip: Path) -> Iterator[dict[str, Run]]:
    """The same listener in real and in virtual time."""
    arguments = ("--camera", f"door={clip}", "--for", f"{NUM_WINDOWS}s", *LISTENER, *GREEDY)
    yield {speed: place.up(*arguments, "--speed", speed, out=speed) for speed in ("real", "max")}
    assert place.leftovers() == []


@pytest.fixture(params=["real", "max"])
def run(runs: dict[str, Run], request: pytest.FixtureRequest) -> Run:
    return runs[request.param]


def texts(run: Run, kind: str, from_s: float, until_s: float) -> list[str]:
    """What was said (by the end of the window) or heard, from … until."""
    return [e["text"] for e in run.events("door", kind) if from_s < e["time_s"] <= until_s and e["text"]]


def skip_if_late(run: Run) -> None:
    """What is said while the listener does something is another matter where windows come seconds late."""
    slowest_s = max(window["latency_s"] or 0.0 for window in run.windows("door"))
    if slowest_s > WINDOW_S:
        pytest.skip(f"a window took {slowest_s:.2f} s: this machine is too busy to speak while it is listened to")


def test_no_window_is_lost_and_nothing_deadlocks(run: Run) -> None:
    assert run.returncode == 0, run.stderr
    assert [window["index"] for window in run.windows("door")] == list(range(NUM_WINDOWS))


def test_unheard_speech_never_exceeds_lead_and_window(run: Run) -> None:
    leads_s = [window["lead_s"] for window in run.windows("door")]
    assert max(leads_s) <= LEAD_S + WINDOW_S
    skip_if_late(run)
    paused = [w["lead_s"] for w in run.windows("door") if PAUSED_S + WINDOW_S <= w["end_s"] < RESUMED_S]
    assert min(paused) > 0, "there was something to hear"


def test_generation_parks_within_lead_and_window_of_a_pause(run: Run) -> None:
    assert texts(run, "said", 0, PAUSED_S + LEAD_S + WINDOW_S)
    assert texts(run, "said", PAUSED_S + LEAD_S + WINDOW_S, RESUMED_S - 0.01) == []
    assert texts(run, "heard", PAUSED_S, RESUMED_S - 0.01) == []


def test_generation_resumes_with_the_listener(run: Run) -> None:
    skip_if_late(run)
    assert texts(run, "said", RESUMED_S, BARGE_INS_S[0])
    assert texts(run, "heard", RESUMED_S - 0.01, BARGE_INS_S[0])


def test_a_barge_in_interrupts_speech(run: Run) -> None:
    interrupts = run.events("door", "barge_in")
    assert [event["time_s"] for event in interrupts] == list(BARGE_INS_S)
    assert [event["epoch"] for event in interrupts] == [1, 2, 3]
    assert max(event["seconds"] for event in interrupts) > 0, "speech was cut off"


@pytest.mark.parametrize("barge_in_s", BARGE_INS_S)
def test_after_a_barge_in_there_is_silence_until_something_new_is_said(run: Run, barge_in_s: float) -> None:
    rate_hz, samples = run.speech("door")
    said_s = [event["time_s"] for event in run.events("door", "said") if event["time_s"] > barge_in_s]
    until_s = min(said_s, default=len(samples) / rate_hz)
    assert until_s >= barge_in_s + 0.5
    assert not np.any(samples[round(barge_in_s * rate_hz) : round(until_s * rate_hz)])


def test_after_a_barge_in_the_session_goes_on(run: Run) -> None:
    assert texts(run, "said", BARGE_INS_S[0], NUM_WINDOWS)
    assert texts(run, "heard", BARGE_INS_S[0], NUM_WINDOWS + LEAD_S + WINDOW_S)


def test_what_was_interrupted_is_dropped_as_stale_and_counted(run: Run) -> None:
    for edge, account in run.ledger().items():
        dropped = {reason for reason in REASONS if account["dropped"][reason]}
        assert dropped <= ({"stale"} if edge in SAID_EDGES else set()), edge
        assert account["in_flight"] == 0, edge


def test_the_listener_changes_nothing_of_what_is_seen_and_heard(runs: dict[str, Run]) -> None:
    assert runs["real"].digests("door") == runs["max"].digests("door")
