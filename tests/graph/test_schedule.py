"""What is to be looked at, and when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graph.chunk import SessionId
from graph.schedule import Schedule

NAMES = [SessionId(name) for name in "abc"]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), st.sampled_from(NAMES), st.none()),
        st.tuples(st.just("plan"), st.sampled_from(NAMES), st.one_of(st.none(), st.integers(0, 20))),
        st.tuples(st.just("forget"), st.sampled_from(NAMES), st.none()),
        st.tuples(st.just("due"), st.none(), st.integers(0, 20)),
    ),
    max_size=40,
)


@given(steps)
def test_each_is_looked_at_when_it_was_touched_or_its_last_plan_is_due_and_never_else(script: list[tuple]) -> None:
    subject, touched, planned = Schedule(), dict[SessionId, None](), dict[SessionId, int]()
    for verb, session, at_ns in script:
        if verb == "touch":
            subject.touch(session)
            touched[session] = None
        elif verb == "forget":
            subject.forget(session)
            touched.pop(session, None), planned.pop(session, None)
        elif verb == "plan":
            subject.plan(session, at_ns)
            planned.pop(session, None)
            planned |= {} if at_ns is None else {session: at_ns}
        else:
            expected = {*touched, *(name for name, due_ns in planned.items() if due_ns <= at_ns)}
            assert set(subject.due(at_ns)) == expected
            touched.clear()
            planned = {name: due_ns for name, due_ns in planned.items() if due_ns > at_ns}
        assert subject.next_ns == min(planned.values(), default=None)
        assert subject.is_empty == (not touched and not planned)


def test_those_that_were_touched_come_first_in_their_order() -> None:
    subject = Schedule()
    subject.plan(NAMES[0], 1)
    subject.touch(NAMES[2]), subject.touch(NAMES[1])
    assert subject.due(1) == [NAMES[2], NAMES[1], NAMES[0]]
