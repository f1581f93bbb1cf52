from __future__ import annotations

from stages.api import SOUND, Array, Chunk, In, Kind, Limit, Nothing, Out, Stage, Unit

HEAT = Kind("frames", Limit(4), {"heat": Array(("float32",), ("height", "width"))}, Nothing)
"""Called like the cameras' pictures, and none of them."""


class Thermal(Stage):
    """Makes what only its name has in common with a picture."""

    sound = In(SOUND, side=True)
    heat = Out(HEAT)

    def process(self, units: list[Unit]) -> list[Chunk]:
        return []
