"""A stage that batches gives each session what it would get alone."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from graph.chunk import Chunk, SessionId
from graph.window import Unit
from stages.session import Session
from stages.stage import Stage
from tests.support.units import session

Work = Mapping[str, Sequence[Unit]]
TOLERANCE = 1e-4  # float32 sums in another order


def open_all(stage: Stage, names: Sequence[str], **fields: object) -> dict[str, Session]:
    opened = {name: session(name, **fields) for name in names}
    for one in opened.values():
        stage.open_session(one)
    return opened


def alone(build: Callable[[], Stage], work: Work, **fields: object) -> dict[str, list[Chunk]]:
    """Each session in a stage of its own."""
    said = {}
    for name, units in work.items():
        stage = build()
        open_all(stage, [name], **fields)
        said[name] = [chunk for unit in units for chunk in stage.process([unit])]
    return said


def together(build: Callable[[], Stage], work: Work, **fields: object) -> dict[str, list[Chunk]]:
    """All sessions in one stage and every batch; the order in the batch turns round from window to window."""
    stage = build()
    open_all(stage, list(work), **fields)
    said: dict[str, list[Chunk]] = {name: [] for name in work}
    for index, units in enumerate(zip(*work.values(), strict=True)):
        turned = list(units[index % len(units) :]) + list(units[: index % len(units)])
        _sort(stage.process(turned), said)
    return said


def coming_and_going(build: Callable[[], Stage], work: Work, **fields: object) -> dict[str, list[Chunk]]:
    """A session joins with every second window, and leaves when its work is done; some windows go alone."""
    stage = build()
    said: dict[str, list[Chunk]] = {name: [] for name in work}
    starts = {name: 2 * place for place, name in enumerate(work)}
    num_steps = max(starts[name] + len(units) for name, units in work.items())
    for step in range(num_steps):
        open_all(stage, [name for name, start in starts.items() if start == step], **fields)
        due = [units[step - starts[name]] for name, units in work.items() if 0 <= step - starts[name] < len(units)]
        _sort(stage.process(due[:1]), said)
        _sort(stage.process(due[1:]), said)
        for name, units in work.items():
            if step - starts[name] == len(units) - 1:
                stage.close_session(SessionId(name))
    return said


def assert_batches(build: Callable[[], Stage], work: Work, **fields: object) -> dict[str, list[Chunk]]:
    """The same alone, in one batch and with sessions that come and go; returns it."""
    expected = alone(build, work, **fields)
    assert_same(together(build, work, **fields), expected)
    assert_same(coming_and_going(build, work, **fields), expected)
    return expected


def assert_same(actual: dict[str, list[Chunk]], expected: dict[str, list[Chunk]]) -> None:
    """Equal chunks: whole numbers, texts and times exactly, real numbers within float32's rounding."""
    assert {name: list(map(_words, chunks)) for name, chunks in actual.items()} == {
        name: list(map(_words, chunks)) for name, chunks in expected.items()
    }
    for name in expected:
        for one, other in zip(actual[name], expected[name], strict=True):
            for key in other.arrays:
                np.testing.assert_allclose(one.arrays[key], other.arrays[key], rtol=TOLERANCE, atol=TOLERANCE)


def _words(chunk: Chunk) -> tuple[object, ...]:
    whole = {key: array.tolist() for key, array in chunk.arrays.items() if array.dtype.kind in "iu"}
    shapes = {key: array.shape for key, array in chunk.arrays.items()}
    return chunk.session, chunk.stream, chunk.start_ns, chunk.duration_ns, dict(chunk.attrs), whole, shapes


def _sort(chunks: Sequence[Chunk], said: dict[str, list[Chunk]]) -> None:
    for chunk in chunks:
        said[chunk.session].append(chunk)
