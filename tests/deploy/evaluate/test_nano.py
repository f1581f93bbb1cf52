"""deploy/evaluate/nano.py: what is asked for, and how the answer is printed."""

import dataclasses

import pytest

from deploy.evaluate.nano import ABLATIONS, EvalOptions, NanoError, Result, plan, report
from model_shards.nano.listening import WordErrors
from model_shards.nano.score import NS_PER_S, Due, Truth, Utterance, score

DOG = Due("scene", "dog_in", 10 * NS_PER_S, ("a dog came in",), 10, 13)
CAT = Due("scene", "cat_in", 20 * NS_PER_S, ("a cat came in",), 20, 23)
SAID = (
    Utterance(((10, " a dog came in"),), 11_300_000_000, 10),
    Utterance(((21, " the cat left"),), 22_300_000_000, 21),
)
RESULT = Result((score(Truth((DOG, CAT), (), 60), SAID),), WordErrors(8, 1, 0), 1.25)


def test_episodes_are_calm_busy_and_quiet_in_turn_in_rooms_of_their_own() -> None:
    first, second = plan(0, 4), plan(1, 4)
    assert [episode.activity for episode in first] == ["calm", "busy", "quiet", "calm"]
    assert len({episode.seed for episode in (*first, *second)}) == 8
    assert plan(1, 2) == second[:2]


def test_cameras_speak_with_voices_that_were_never_trained_on() -> None:
    (episode,) = plan(0, 1)
    source = episode.source(ABLATIONS["whole"])
    assert source == f"synthetic://room?seed={episode.seed}&events=calm&voices=evaluation"
    assert episode.source(ABLATIONS["frames-late"]) == f"{source}&picture_delay=1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ablation": "tail"}, "--ablation tail: there are whole, tail-off, frames-late, half-frames, audio-late, all"),
        ({"num_episodes": 0}, "--episodes 1 to 1000"),
        ({"seed": -1}, "--seed is 0 to 99999"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(change: dict[str, object], message: str) -> None:
    with pytest.raises(NanoError, match=message):
        dataclasses.replace(EvalOptions(), **change)  # type: ignore[arg-type]


def test_the_measures_have_the_keys_of_the_promise() -> None:
    assert RESULT.measures() == {
        "recall": 0.5,
        "precision": 0.5,
        "reaction_p95_s": 1.3,
        "false_per_10min": 0.0,
        "question_accuracy": None,
        "standing_honoured": None,
        "stop_obeyed": None,
        "wer": 0.125,
        "teacher_wer": 0.0,
        "unheard_max_s": 1.25,
        "by_kind": {
            "scene": {"cat_in": {"said": 0, "due": 1}, "dog_in": {"said": 1, "due": 1}},
            "sound": {},
            "standing": {},
            "question": {},
            "okay": {},
        },
    }


def test_the_table_has_a_column_per_ablation_and_says_what_went_wrong() -> None:
    lines = report({"whole": RESULT, "audio-late": RESULT})
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert ["reach", "whole", "audio-late"] in rows
    assert ["events remarked", ">= 95 %", "50.0 %", "50.0 %"] in rows
    assert ["questions answered right", ">= 90 %", "-", "-"] in rows
    assert ["scene", "cat_in", "0 of 1", "0 of 1"] in rows
    assert ["1", "scene", "cat_in", "a cat came in", "the cat left"] in rows
