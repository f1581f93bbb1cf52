from __future__ import annotations

from stages.api import EVENTS, FRAMES, NS_PER_S, SOUND, SOUND_RATE_HZ, Chunk, In, Out, Stage, Unit


class Scene(Stage):
    """What is seen in a second beside what was heard in the last two."""

    frames = In(FRAMES, side=True)
    sound = In(SOUND, side=True, window_ns=2 * NS_PER_S)
    scenes = Out(EVENTS)

    def process(self, units: list[Unit]) -> list[Chunk]:
        return [self._describe(unit) for unit in units]

    def _describe(self, unit: Unit) -> Chunk:
        pictures, sounds = unit.of(self.frames), unit.of(self.sound)
        heard_s = sum(len(sound.arrays["samples"]) for sound in sounds) / SOUND_RATE_HZ
        return self.scenes.event(
            unit.session, unit.start_ns, "scene", window=unit.index, pictures=len(pictures), heard_s=heard_s
        )
