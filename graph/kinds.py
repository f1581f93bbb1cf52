"""What a kind of stream is, said once: how its edges behave, and what the machinery may do with its chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from graph.credit import Limit
from graph.window import Late

WhenFull: TypeAlias = Literal["wait", "drop_oldest"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of stream. A port carries one kind; an edge joins an output and an input of the same kind.

    credit, when_full, late: what an edge does where the description does not say.
    is_windowed:  its chunks belong to windows, and watermarks come with them; else they are news, taken as they come.
    is_control:   it carries control chunks only, which take no credit and overtake data.
    is_raw:       what a source saw or heard itself: it is hashed into the window's digest.
    is_fenced:    it is said: what is under way when the listener interrupts is stale.
    is_picture:   one chunk per picture: its credit grows with the cameras' fps.
    is_sheddable: chunks of it may be left out under overload.
    """

    name: str
    credit: Limit
    when_full: WhenFull = "wait"
    late: Late = "carry"
    is_windowed: bool = True
    is_control: bool = False
    is_raw: bool = False
    is_fenced: bool = False
    is_picture: bool = False
    is_sheddable: bool = False

    def __str__(self) -> str:
        return self.name
