"""Cores that threads share, as an operating system lets them: each gets an equal part of what there is, a core at most.

A turn learns its end when it begins. Who comes later makes it no slower, but what it still has to do by then stands in
the way of the next ones, and its own thread does it before anything else: so no more is done than the cores can do.
"""

from __future__ import annotations

from deploy.simulator.world import World


class Cores:
    """num_cores: without what something else has of them at all times. rivals: threads of others that always have work,
    on average."""

    def __init__(self, world: World, num_cores: float, rivals: float = 0.0) -> None:
        self._world, self._num_cores, self._rivals = world, num_cores, rivals
        self._left: dict[Thread, float] = {}  # work of each thread that has some, as of `_at_ns`
        self._at_ns = 0.0

    def thread(self) -> Thread:
        return Thread(self._world, self)

    def begin(self, thread: Thread, work_ns: int, now_ns: int) -> int:
        """A thread has so much more to do; until when that takes."""
        self._pass(now_ns)
        return self.extend(thread, work_ns)

    def extend(self, thread: Thread, work_ns: int) -> int:
        """The same of a thread that has just come to the end of what it had to do."""
        self._left[thread] = self._left.get(thread, 0.0) + work_ns
        at_ns, done = self._at_ns, 0.0
        for rank, left in enumerate(sorted(self._left.values())):
            at_ns += (left - done) / self._share(len(self._left) - rank)
            done = left
            if left >= self._left[thread]:
                break
        return round(at_ns)

    def _pass(self, now_ns: int) -> None:
        while self._left and self._at_ns < now_ns:
            share = self._share(len(self._left))
            step_ns = min(now_ns - self._at_ns, min(self._left.values()) / share)
            self._at_ns += step_ns
            # What rounding leaves is nothing: less than a nanosecond.
            rest = {thread: left - step_ns * share for thread, left in self._left.items()}
            self._left = {thread: left for thread, left in rest.items() if left >= 1.0}
        self._at_ns = max(self._at_ns, now_ns)

    def _share(self, num_threads: int) -> float:
        return min(1.0, self._num_cores / (num_threads + self._rivals))


class Thread:
    """One that works on cores beside others; see world.Device."""

    def __init__(self, world: World, cores: Cores) -> None:
        self._world, self._cores = world, cores
        self._end_ns = -1
        self.busy_ns = self.took_ns = 0  # what was done, and how long that took

    def work(self, cost_ns: int) -> None:
        """Work as the actor whose turn it is: for it, time moves on."""
        now_ns = self._world.now_ns
        same = now_ns == self._end_ns
        self._end_ns = self._cores.extend(self, cost_ns) if same else self._cores.begin(self, cost_ns, now_ns)
        self._end_ns = self._world.now_ns = max(self._end_ns, now_ns)
        self.busy_ns += cost_ns
        self.took_ns += self._end_ns - now_ns
