"""`synthetic://room`: a watched room as a camera with a microphone gives it, without end. Needs no torch.

Rule: the same address is the same room, picture by picture and sample by sample, whoever reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from model_shards.nano.clips import Cast, load_bank
from model_shards.nano.painter import Painter
from model_shards.nano.scene import Scene
from model_shards.nano.sounds import Bank, Samples, Track
from model_shards.nano.world import NS_PER_S, UNSEEN, WINDOW_NS, Activity, Episode, plan_episode

BLOCK_NS: Final = 600 * NS_PER_S  # planned at once; the next one begins with the scene in which this one ended
_NEXT_BLOCK: Final = 1_000_003  # in seeds


@dataclass(frozen=True)
class SyntheticRoom:
    """seed: at least 0; no room is one that nano was trained on. cast: who speaks.

    picture_delay, sound_delay: windows by which what is seen or heard comes too late, for trials.
    """

    seed: int = 0
    activity: Activity = "calm"
    cast: Cast = "room"
    side: int = 224
    picture_delay: int = 0
    sound_delay: int = 0

    def picture(self, t_ns: int) -> npt.NDArray[np.uint8]:
        """(side, side, 3) uint8, RGB, read-only: the room at this time, which is at least 0."""
        seen_ns = max(0, t_ns - self.picture_delay * WINDOW_NS)
        episode = self.episode(seen_ns // BLOCK_NS)
        return self._painter.paint(episode.scene_at(seen_ns % BLOCK_NS), seen_ns)

    def samples(self, start_ns: int, end_ns: int) -> Samples:
        """[n] float32 at 16 kHz within [-1, 1]; both times are whole samples."""
        late_ns = self.sound_delay * WINDOW_NS
        start_ns, end_ns = start_ns - late_ns, end_ns - late_ns
        pieces = [self._track(-1).samples(start_ns, min(end_ns, 0))] if start_ns < 0 else []
        start_ns = max(start_ns, 0)
        while start_ns < end_ns:
            block, zero_ns = start_ns // BLOCK_NS, start_ns // BLOCK_NS * BLOCK_NS
            until_ns = min(end_ns, zero_ns + BLOCK_NS)
            pieces.append(self._track(block).samples(start_ns - zero_ns, until_ns - zero_ns))
            start_ns = until_ns
        return np.concatenate(pieces)

    def episode(self, block: int) -> Episode:
        """What happens in the block's 600 seconds; its times begin at 0."""
        known = self._episodes
        while len(known) <= block:
            opening = known[-1].scene_at(BLOCK_NS) if known else None
            known.append(self._plan(len(known), opening))
        return known[block]

    def _plan(self, block: int, opening: Scene | None) -> Episode:
        seed = self._look + block * _NEXT_BLOCK
        return plan_episode(seed, BLOCK_NS, self.activity, self._bank.duration_ns, opening=opening)

    def _track(self, block: int) -> Track:
        """Block -1 is the silence before all."""
        if block not in self._tracks:
            self._tracks.clear()
            episode = self.episode(block) if block >= 0 else Episode(self._look, BLOCK_NS, Scene(), ())
            self._tracks[block] = Track(episode, self._bank, seed=self._look)
        return self._tracks[block]

    @property
    def _look(self) -> int:
        return UNSEEN + self.seed

    @cached_property
    def _painter(self) -> Painter:
        return Painter(self._look, self.side)

    @cached_property
    def _bank(self) -> Bank:
        return load_bank(self.cast)

    @cached_property
    def _episodes(self) -> list[Episode]:
        return []

    @cached_property
    def _tracks(self) -> dict[int, Track]:
        return {}
