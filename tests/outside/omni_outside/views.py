from __future__ import annotations

from stages.api import EVENTS, FRAMES, NS_PER_S, Chunk, In, Out, Stage, Unit


class Views(Stage):
    """Which views a window shows, in their order, and which the last two seconds did."""

    frames = In(FRAMES, side=True)
    lately = In(FRAMES, side=True, window_ns=2 * NS_PER_S)
    seen = Out(EVENTS)

    def process(self, units: list[Unit]) -> list[Chunk]:
        return [self._tell(unit) for unit in units]

    def _tell(self, unit: Unit) -> Chunk:
        views = [picture.view for picture in unit.of(self.frames)]
        lately = {picture.view for picture in unit.of(self.lately)}
        fields = {"window": unit.index, "views": ",".join(views), "lately": ",".join(sorted(lately))}
        return self.seen.event(unit.session, unit.start_ns, "views", **fields)
