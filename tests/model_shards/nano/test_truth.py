"""The oracle, judged by its own truth, makes no mistake."""

import pytest

from model_shards.nano.oracle import Oracle, Speak
from model_shards.nano.phrases import Request
from model_shards.nano.score import NS_PER_S, Score, Utterance, score, summary
from model_shards.nano.truth import truth_of
from model_shards.nano.world import ACTIVITIES, Activity, Episode, plan_episode


def duration_of(request: Request, clip_seed: int) -> int:
    return 900_000_000


def episode(seed: int, activity: Activity) -> Episode:
    return plan_episode(seed, 60 * NS_PER_S, activity, duration_of)


def ideal(watched: Episode) -> list[Utterance]:
    """What the oracle says, heard 300 ms after the window."""
    oracle, utterances = Oracle(), list[Utterance]()
    words: list[tuple[int, str]] = []
    for window in watched.windows():
        said = oracle.step(window)
        if not isinstance(said, Speak):
            continue
        if said.words:
            words.append((window.index, " ".join(said.words)))
        if said.end_of_turn and words:
            heard_ns = (words[0][0] + 1) * NS_PER_S + 300_000_000
            utterances.append(Utterance(tuple(words), heard_ns, window.index))
            words = []
    return utterances


def judged(watched: Episode) -> Score:
    return score(truth_of(watched), ideal(watched))


@pytest.mark.parametrize("activity", ACTIVITIES)
def test_the_oracle_makes_no_mistake(activity: Activity) -> None:
    scores = [judged(episode(seed, activity)) for seed in range(40)]
    totals = summary(scores)
    assert [mistake for one in scores for mistake in one.mistakes] == []
    perfect = 1.0 if activity != "quiet" else None
    for name in ("recall", "precision", "question_accuracy", "standing_honoured", "stop_obeyed"):
        assert totals[name] in (perfect, None), name
    assert totals["false_per_10min"] == 0.0


def test_the_oracle_reacts_within_the_goal() -> None:
    totals = summary([judged(episode(seed, activity)) for seed in range(40) for activity in ACTIVITIES])
    assert totals["reaction_p95_s"] <= 3.2  # some events come in the middle of a long sentence


def test_the_beginning_of_a_long_episode_is_judged_alike() -> None:
    watched = plan_episode(3, 600 * NS_PER_S, "busy", duration_of)
    spoken = [utterance for utterance in ideal(watched) if utterance.last_window < 60]
    assert score(truth_of(watched, 60), spoken).false_remarks == 0
