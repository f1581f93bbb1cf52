"""stages/vision_encoder.py: pictures of many cameras in one forward."""

import numpy as np

from graph.chunk import NS_PER_S, Chunk, SessionId
from tests.support.batching import assert_batches
from tests.support.tiny import Tiny
from tests.support.units import unit

NAMES = ("a", "b", "c")


def picture(name: str, index: int, height: int = 96, width: int = 128, at_ns: int = 0) -> Chunk:
    seed = sum(map(ord, name)) * 100 + index
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Chunk(SessionId(name), f"camera/{name}", index * NS_PER_S + at_ns, arrays={"image": image})


def test_sessions_get_the_same_alone_and_in_any_batch(tiny: Tiny):
    sizes = {"a": (96, 128), "b": (128, 96), "c": (64, 64)}
    work = {name: [unit(name, k, picture(name, k, *sizes[name])) for k in range(4)] for name in NAMES}
    said = assert_batches(tiny.vision_encoder, work)
    assert [chunk.arrays["embeds"].shape for chunk in said["a"]] == [(1, 64, 128)] * 4


def test_every_picture_gives_one_chunk_at_its_own_time(tiny: Tiny):
    times = (0, NS_PER_S // 3, NS_PER_S // 2)
    pictures = [picture("a", 2, at_ns=at_ns) for at_ns in times]
    said = tiny.vision_encoder().process([unit("a", 2, *pictures)])
    assert [chunk.start_ns for chunk in said] == [2 * NS_PER_S + at_ns for at_ns in times]


def test_a_window_without_a_picture_gives_nothing(tiny: Tiny):
    said = tiny.vision_encoder().process([unit("a", 0), unit("b", 0, picture("b", 0))])
    assert [chunk.session for chunk in said] == ["b"]
    assert tiny.vision_encoder().process([unit("a", 0)]) == []


def test_a_large_picture_is_cut_into_cells_behind_the_whole(tiny: Tiny):
    stage = tiny.vision_encoder(max_slices=4)
    large, small = picture("a", 0, 900, 900), picture("b", 0)
    said = {chunk.session: chunk for chunk in stage.process([unit("a", 0, large), unit("b", 0, small)])}
    assert said["a"].arrays["embeds"].shape == (5, 64, 128)
    assert said["b"].arrays["embeds"].shape == (1, 64, 128)
