import subprocess
import sys

import numpy as np

from model_shards.nano.synthetic import BLOCK_NS, SyntheticRoom
from model_shards.nano.world import NS_PER_S


def test_sound_is_the_same_in_whatever_pieces_it_is_read():
    room = SyntheticRoom(seed=1, activity="busy")
    start_ns, end_ns = BLOCK_NS - 3 * NS_PER_S, BLOCK_NS + 3 * NS_PER_S
    pieces = [room.samples(t, t + NS_PER_S) for t in range(start_ns, end_ns, NS_PER_S)]
    assert np.array_equal(SyntheticRoom(seed=1, activity="busy").samples(start_ns, end_ns), np.concatenate(pieces))


def test_a_block_begins_with_the_scene_in_which_the_last_one_ended():
    room = SyntheticRoom(seed=2, activity="busy")
    assert room.episode(1).opening == room.episode(0).scene_at(BLOCK_NS)
    assert room.episode(1).happenings != room.episode(0).happenings


def test_what_is_late_is_what_was():
    room, late = SyntheticRoom(seed=3), SyntheticRoom(seed=3, picture_delay=1, sound_delay=2)
    assert np.array_equal(late.picture(5 * NS_PER_S), room.picture(4 * NS_PER_S))
    assert np.array_equal(late.samples(5 * NS_PER_S, 6 * NS_PER_S), room.samples(3 * NS_PER_S, 4 * NS_PER_S))
    assert late.samples(0, 3 * NS_PER_S).size == 3 * 16_000


def test_a_room_needs_no_torch():
    use = "from model_shards.nano.synthetic import SyntheticRoom; SyntheticRoom().picture(0)"
    subprocess.run([sys.executable, "-c", f"{use}; import sys; assert 'torch' not in sys.modules"], check=True)
