"""What follows from the wiring, for any stages that are wired without a circle."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from graph.wiring import Link, Wiring

NAMES = "abcdefgh"


@st.composite
def wired(draw: st.DrawFn) -> tuple[list[str], list[Link]]:
    """Stages in any order, links from earlier names to later ones, and some news back."""
    count = draw(st.integers(1, len(NAMES)))
    stages = draw(st.permutations(NAMES[:count]))
    pairs = [(a, b) for a in NAMES[:count] for b in NAMES[:count] if a < b]
    taken = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    links = [Link(a, b, is_windowed=draw(st.booleans())) for a, b in taken]
    back = [Link(b, a, is_windowed=False, is_feedback=True) for a, b in taken if draw(st.booleans())]
    return stages, links + back


def forward(links: list[Link]) -> list[Link]:
    return [link for link in links if not link.is_feedback]


@given(wired())
def test_upstream_comes_first_and_downstream_first_is_the_other_way_round(case: tuple[list[str], list[Link]]) -> None:
    stages, links = case
    wiring = Wiring(stages, links)
    order = wiring.upstream_first
    assert sorted(order) == sorted(stages)
    assert all(order.index(link.source) < order.index(link.target) for link in forward(links))
    assert wiring.downstream_first == order[::-1]


@given(wired())
def test_the_order_does_not_depend_on_the_order_of_the_links(case: tuple[list[str], list[Link]]) -> None:
    stages, links = case
    assert Wiring(stages, links).upstream_first == Wiring(stages, links[::-1]).upstream_first


@given(wired())
def test_a_source_makes_windows_and_takes_none(case: tuple[list[str], list[Link]]) -> None:
    stages, links = case
    windows = [link for link in forward(links) if link.is_windowed]
    expected = {link.source for link in windows} - {link.target for link in windows}
    assert set(Wiring(stages, links).sources) == expected


@given(wired(), st.data())
def test_what_is_left_has_something_to_do_and_what_is_idle_has_not(
    case: tuple[list[str], list[Link]], data: st.DataObject
) -> None:
    stages, links = case
    off = data.draw(st.sets(st.sampled_from(stages)))
    needed = data.draw(st.sets(st.sampled_from(stages)))
    idle = Wiring(stages, links).idle(off, needed)
    windows = [link for link in forward(links) if link.is_windowed]
    assert off <= idle
    assert not (idle - off) & needed
    for stage in set(stages) - idle - needed:
        sources = {link.source for link in windows if link.target == stage}
        targets = {link.target for link in windows if link.source == stage}
        assert not sources or sources - idle
        assert not targets or targets - idle


@given(wired(), st.data())
def test_the_longest_way_is_no_shorter_than_any_two_stages_of_it(
    case: tuple[list[str], list[Link]], data: st.DataObject
) -> None:
    stages, links = case
    costs = {stage: data.draw(st.integers(0, 100)) for stage in stages}
    longest = Wiring(stages, links).longest(costs)
    assert max(costs.values()) <= longest <= sum(costs.values())
    for link in forward(links):
        if link.is_windowed:
            assert longest >= costs[link.source] + costs[link.target]


@given(wired(), st.data())
def test_windows_end_where_no_other_candidate_comes_behind(
    case: tuple[list[str], list[Link]], data: st.DataObject
) -> None:
    stages, links = case
    candidates = data.draw(st.sets(st.sampled_from(stages), min_size=1))
    side = data.draw(st.sets(st.sampled_from(stages)))
    marked = [replace(link, is_side=link.target in side) for link in links]
    ends = Wiring(stages, marked).ends(candidates)
    assert ends and ends <= candidates
    way = {(link.source, link.target) for link in marked if link.is_windowed and not (link.is_side or link.is_feedback)}
    assert not {target for source, target in way if source in ends} & candidates
    assert Wiring(stages, [link for link in marked if not link.is_side]).ends(candidates) == ends
