"""graph/window.py where a camera has several views: each a stream of its own, which may come and go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, SessionId
from graph.trace import leave_stage
from graph.window import FOREVER_NS, Input, Unit, WindowJoin
from stages.vision_encoder import VisionEncoder
from tests.support.streams import input_of

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

PORCH = SessionId("porch")
EDGE, FRONT, BACK, MIC = "the pictures", "camera/porch/front", "camera/porch/back", "mic"
T, LATENESS = NS_PER_S, 150 * NS_PER_MS


def pictures(*, is_side: bool = False, window_ns: int | None = None) -> Input:
    return replace(input_of(FRONT, "drop", EDGE), is_many=True, is_side=is_side, window_ns=window_ns)


def join(*views: str, lateness_ns: int | None = LATENESS, taken: Input | None = None, sound: bool = True) -> WindowJoin:
    inputs: Mapping[str, Input] = dict.fromkeys(views, taken or pictures())
    return WindowJoin(
        PORCH, {**inputs, **({MIC: input_of(MIC)} if sound else {})}, window_ns=T, lateness_ns=lateness_ns
    )


def picture(stream: str, at_ns: int, seq: int = 0) -> Chunk:
    return Chunk(PORCH, stream, at_ns, seq=seq, view=stream.rpartition("/")[2])


def through(subject: WindowJoin, at_ns: int, *streams: str) -> list[Unit]:
    return [unit for stream in streams for unit in subject.advance(stream, at_ns).units]


def missing(units: Sequence[Unit]) -> list[list[str]]:
    return [sorted(unit.missing) for unit in units]


def test_pictures_of_all_views_are_in_the_order_of_time_and_view():
    subject = join(FRONT, BACK)
    for stream, at_ns in ((FRONT, 0), (FRONT, T // 2), (BACK, T // 4), (BACK, T // 2)):
        subject.add(picture(stream, at_ns))
    (unit,) = through(subject, T, FRONT, MIC, BACK)
    seen = [(chunk.start_ns, chunk.view) for chunk in unit.of(VisionEncoder.frames)]
    assert seen == [(0, "front"), (T // 4, "back"), (T // 2, "back"), (T // 2, "front")]


def test_a_view_that_gives_nothing_is_missing_by_its_name():
    subject = join(FRONT, BACK)
    subject.add(picture(FRONT, 0))
    assert missing(through(subject, T, FRONT, BACK, MIC)) == [[BACK, MIC]]


def test_a_view_that_is_lost_costs_its_pictures_and_the_lateness_of_a_window():
    subject = join(FRONT, BACK)
    subject.add(picture(FRONT, 0))
    assert through(subject, T, FRONT, MIC) == []
    assert subject.expire(T + LATENESS - 1).units == ()
    (unit,) = subject.expire(T + LATENESS).units
    assert (unit.awaited, unit.missing) == ({BACK}, {BACK, MIC})
    assert [chunk.view for chunk in unit.of(VisionEncoder.frames)] == ["front"]


def test_a_view_that_comes_later_is_missing_from_its_first_window_on():
    subject = join(FRONT)
    assert subject.open(BACK, EDGE, 2 * T)
    assert missing(through(subject, 4 * T, FRONT, MIC)) == [[FRONT, MIC], [FRONT, MIC]]
    assert missing(through(subject, 4 * T, BACK)) == [[BACK, FRONT, MIC], [BACK, FRONT, MIC]]


def test_a_view_that_was_taken_away_is_missing_no_more_and_what_it_gave_before_is_seen():
    subject = join(FRONT, BACK)
    subject.add(picture(BACK, T // 2))
    subject.add(picture(BACK, T + T // 2, seq=1))
    subject.end(BACK, 2 * T, removed=True)
    units = through(subject, 4 * T, FRONT, MIC)
    assert [len(unit.of(VisionEncoder.frames)) for unit in units] == [1, 1, 0, 0]
    assert missing(units) == [[FRONT, MIC]] * 4
    assert BACK not in subject.inputs


def test_a_view_that_has_ended_by_itself_stays_missing_until_it_is_taken_away():
    subject = join(FRONT, BACK)
    subject.end(BACK, T)
    assert missing(through(subject, 2 * T, FRONT, MIC)) == [[BACK, FRONT, MIC]] * 2
    subject.end(BACK, T, removed=True)
    assert missing(through(subject, 3 * T, FRONT, MIC)) == [[FRONT, MIC]]


def test_a_view_may_come_again_whether_it_is_forgotten_already_or_not():
    for num_windows in (1, 4):
        subject = join(FRONT, BACK)
        subject.end(BACK, T, removed=True)
        through(subject, num_windows * T, FRONT, MIC)
        if BACK not in subject.inputs:
            subject.open(BACK, EDGE, 5 * T)
        subject.advance(BACK, 5 * T)
        subject.add(picture(BACK, 5 * T))
        units = [*through(subject, 6 * T, FRONT, MIC), *through(subject, 6 * T, BACK)]
        assert missing(units[-2:]) == [[FRONT, MIC], [FRONT, MIC]]
        assert [chunk.view for chunk in units[-1].of(VisionEncoder.frames)] == ["back"]


def test_the_last_view_of_all_is_never_forgotten():
    subject = join(FRONT, sound=False)
    subject.end(FRONT, T, removed=True)
    assert subject.finished
    assert FRONT in subject.inputs


def test_where_an_edge_brings_one_stream_no_other_is_opened():
    subject = join(FRONT, taken=replace(pictures(), is_many=False))
    assert not subject.open(BACK, EDGE, 0)


def test_a_view_beside_delays_no_window():
    subject = join(FRONT, taken=pictures(is_side=True))
    subject.open(BACK, EDGE, 0)
    subject.add(picture(BACK, 0))
    (unit,) = through(subject, T, MIC)
    assert [chunk.view for chunk in unit.of(VisionEncoder.frames)] == ["back"]
    subject.end(MIC, T), subject.end(FRONT, T)
    assert (subject.finished, subject.ended) == (True, False)
    subject.end(BACK, T, removed=True)
    assert subject.ended


def test_a_sliding_window_slides_over_a_view_that_comes_later():
    subject = join(FRONT, taken=pictures(window_ns=2 * T))
    subject.open(BACK, EDGE, T)
    for at_ns in (T, 2 * T):
        subject.add(picture(BACK, at_ns, seq=at_ns // T))
    units = through(subject, 3 * T, FRONT, MIC, BACK)
    assert [len(unit.of(VisionEncoder.frames)) for unit in units] == [0, 1, 2]


# ---- what is said of it on the way ---------------------------------------------------------------------------------


def test_a_view_that_is_missing_beside_another_does_not_make_the_stage_idle():
    subject = join(FRONT, BACK, sound=False)
    subject.add(picture(FRONT, 0))
    (unit,) = through(subject, T, FRONT, BACK)
    trace = leave_stage(unit)
    assert (trace.missing, trace.missing_views, trace.all_missing) == ((), (BACK,), (BACK,))
    # Then: behind the encoder, where the pictures of all views are one stream, it is still known by its name.
    behind = WindowJoin(PORCH, {"image": input_of("image")}, window_ns=T, lateness_ns=None)
    behind.add(Chunk(PORCH, "image", 0))
    assert leave_stage(*behind.advance("image", T, trace).units).all_missing == (BACK,)


def test_views_that_are_all_missing_are_missing_as_one_camera_is():
    subject = join(FRONT, BACK, sound=False)
    trace = leave_stage(*through(subject, T, FRONT, BACK))
    assert (trace.missing, trace.missing_views) == ((BACK, FRONT), ())


def test_of_a_window_that_was_given_up_the_view_is_named_for_which_it_waited():
    subject = join(FRONT, BACK, sound=False)
    subject.add(picture(FRONT, 0))
    through(subject, T, FRONT)
    assert leave_stage(*subject.expire(2 * T).units).missing_views == (BACK,)


# ---- any order of arrival ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    verb: str
    stream: str
    at_ns: int
    seq: int = 0


@st.composite
def script(draw: st.DrawFn, stream: str, from_ns: int) -> list[Word]:
    """What a stream legally says, from its first watermark to its end."""
    words, watermark_ns, latest_ns = [Word("watermark", stream, from_ns)], from_ns, from_ns
    for seq in range(draw(st.integers(0, 6))):
        is_chunk = draw(st.booleans())
        at_ns = watermark_ns + draw(st.integers(0, 8))
        words.append(Word("chunk" if is_chunk else "watermark", stream, at_ns, seq))
        latest_ns, watermark_ns = max(latest_ns, at_ns), watermark_ns if is_chunk else at_ns
    verb = draw(st.sampled_from(["end", "removed"])) if from_ns else "end"
    return [*words, Word(verb, stream, -(-latest_ns // 4) * 4)]


def say(subject: WindowJoin, word: Word) -> Sequence[Unit]:
    if word.stream not in subject.inputs and word.verb in ("watermark", "chunk"):
        subject.open(word.stream, EDGE, word.at_ns)
    if word.verb == "chunk":
        return subject.add(picture(word.stream, word.at_ns, word.seq)).units
    if word.verb in ("end", "removed"):
        return subject.end(word.stream, word.at_ns, removed=word.verb == "removed").units
    return subject.advance(word.stream, word.at_ns).units


def merged(pick: Sequence[int], scripts: Sequence[Sequence[Word]], come_ns: Mapping[str, int]) -> list[Word]:
    """One order of arrival. A view that comes later does so before any other word of a later time, as on one edge."""
    queues, words = [list(words) for words in scripts], list[Word]()
    for number in pick:
        talking = [queue for queue in queues if queue]
        queue = talking[number % len(talking)]
        for other in talking:
            comes_ns = come_ns.get(other[0].stream, FOREVER_NS)
            is_new = other[0].stream in come_ns and all(word.stream != other[0].stream for word in words)
            if is_new and (queue[0].at_ns > comes_ns or queue[0].verb == "end"):
                queue = other
        words.append(queue.pop(0))
    return words


@unhurried
@given(st.data())
def test_any_order_of_arrival_gives_the_same_units_while_views_come_and_go(data: st.DataObject):
    come_ns = {f"camera/porch/{name}": 4 * data.draw(st.integers(1, 3)) for name in ("side", "top")}
    scripts = [data.draw(script(stream, at_ns)) for stream, at_ns in {FRONT: 0, MIC: 0, **come_ns}.items()]
    num_words = sum(map(len, scripts))
    orders = st.lists(st.integers(0, 11), min_size=num_words, max_size=num_words)

    def units() -> list[tuple[object, ...]]:
        inputs = {FRONT: pictures(), MIC: input_of(MIC)}
        subject = WindowJoin(PORCH, inputs, window_ns=4, lateness_ns=None)
        words = merged(data.draw(orders), scripts, come_ns)
        left = [unit for word in words for unit in say(subject, word)]
        assert subject.finished
        return [(unit.index, dict(unit.chunks), unit.missing) for unit in left]

    assert units() == units()
