from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.nano.oracle import NUM_SILENT, Oracle, Speak
from model_shards.nano.phrases import REQUESTS, SCENE_EVENTS, SOUNDS, Request
from model_shards.nano.world import (
    ACTIVITIES,
    EFFECT_NS,
    HUSH_NS,
    NS_PER_S,
    SIMPLE,
    Activity,
    Episode,
    expected,
    plan_episode,
)

MINUTE_NS = 60 * NS_PER_S
seeds = st.integers(0, 1 << 30)


def duration_ns(request: Request, clip_seed: int) -> int:
    return (400 + clip_seed % 1600) * 1_000_000


def plan(seed: int, activity: Activity = "busy", length_ns: int = MINUTE_NS) -> Episode:
    return plan_episode(seed, length_ns, activity, duration_ns)


@given(seeds, st.sampled_from(ACTIVITIES))
@settings(max_examples=30, deadline=None)
def test_the_same_seed_gives_the_same_episode(seed, activity):
    assert plan(seed, activity) == plan(seed, activity)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_all_is_placed_so_that_it_can_be_known_in_its_window(seed):
    for happening in plan(seed).happenings:
        start_ms, end_ms = (t % NS_PER_S // 1_000_000 for t in (happening.start_ns, happening.end_ns))
        if happening.kind in SOUNDS:
            assert 50 <= start_ms <= 450
        elif happening.kind in REQUESTS:
            assert 350 <= end_ms <= 800
            assert happening.end_ns - happening.start_ns == duration_ns(happening.kind, happening.clip_seed)
        else:
            assert 50 <= start_ms <= 650


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_no_two_things_are_heard_at_once(seed):
    heard = [happening for happening in plan(seed).happenings if happening.kind not in SCENE_EVENTS]
    for first, second in pairwise(heard):
        over_ns = first.start_ns + EFFECT_NS if first.kind in SOUNDS else first.end_ns
        assert second.start_ns >= over_ns + HUSH_NS


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_windows_show_every_happening_once_in_its_window(seed):
    episode = plan(seed)
    seen = Counter((window.index, kind) for window in episode.windows() for kind in window.requests + window.sounds)
    seen += Counter((window.index, change.event) for window in episode.windows() for change in window.changes)
    assert seen == Counter((happening.end_ns // NS_PER_S, happening.kind) for happening in episode.happenings)


@given(seeds, st.sampled_from(ACTIVITIES))
@settings(max_examples=30, deadline=None)
def test_never_more_than_two_utterances_wait_and_all_are_said_in_the_end(seed, activity):
    oracle, last = Oracle(), None
    for window in plan(seed, activity).windows():
        last = oracle.step(window)
        assert len(oracle.waiting) <= 2
    assert oracle.waiting == () and last is not None


def test_nothing_happens_in_a_quiet_room_nor_at_the_start_of_any():
    assert all(plan(seed, "quiet").happenings == () for seed in range(20))
    starts = [happening.start_ns for seed in range(20) for happening in plan(seed).happenings if happening.change]
    assert min(starts) >= NUM_SILENT * NS_PER_S


@pytest.mark.parametrize(("activity", "low", "high"), [("calm", 0.12, 0.3), ("busy", 0.38, 0.6)])
def test_an_activity_is_how_much_there_is_to_say(activity, low, high):
    spoken = total = 0
    for seed in range(40):
        oracle = Oracle()
        outputs = [oracle.step(window) for window in plan(seed, activity).windows()]
        spoken += sum(isinstance(output, Speak) for output in outputs)
        total += len(outputs)
    assert low < spoken / total < high


def test_hardly_anything_is_told_more_than_one_window_late():
    entries = [one for seed in range(60) for one in expected(plan(seed)) if one.kind != "answer"]
    late = [one for one in entries if one.ideal_window is None or one.ideal_window - one.window > 1]
    waited = [one for one in entries if one.ideal_window is not None and one.ideal_window > one.window]
    assert len(late) < 0.03 * len(entries)
    assert len(waited) > 0.1 * len(entries), "much happens while nano speaks"


def test_everything_that_can_happen_does_and_rare_things_are_not_too_rare():
    counts = Counter(happening.kind for seed in range(150) for happening in plan(seed).happenings)
    assert set(counts) == {*SCENE_EVENTS, *SOUNDS, *REQUESTS}
    assert min(counts.values()) > 0.003 * counts.total()


def test_standing_requests_are_followed_by_what_was_awaited():
    promises = [one for seed in range(60) for one in expected(plan(seed)) if one.kind == "promise"]
    assert len(promises) > 30


def test_a_simple_mix_has_nobody_speaking():
    kinds = {
        h.kind for seed in range(20) for h in plan_episode(seed, MINUTE_NS, "busy", duration_ns, SIMPLE).happenings
    }
    assert not kinds & set(REQUESTS)


def test_an_episode_goes_on_where_another_ended():
    first = plan(1)
    end = first.scene_at(MINUTE_NS)
    assert plan_episode(2, MINUTE_NS, "busy", duration_ns, opening=end).scene_at(0) == end


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_what_is_expected_is_what_the_oracle_says(seed):
    episode = plan(seed)
    oracle, said = Oracle(), []
    for window in episode.windows():
        label = oracle.step(window)
        if isinstance(label, Speak) and oracle.saying is not None and oracle.saying not in said:
            said.append(oracle.saying)
    entries = expected(episode)
    assert {(one.text, one.window) for one in entries if one.ideal_window is not None} == {
        (utterance.text, utterance.window) for utterance in said
    }
    for one in entries:
        assert one.text in one.accept
        assert one.window * NS_PER_S <= one.cause_ns < (one.window + 1) * NS_PER_S
        assert one.ideal_window is None or one.ideal_window >= one.window
