"""The ledger of an edge: every chunk accepted is delivered, or dropped for a named reason, or in flight. Exactly.

The sender counts what it accepted and dropped, the receiver what it delivered and dropped; `merge` puts both ends of
an edge together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Literal, get_args

from graph.value import value

Reason = Literal["late", "shed", "closed", "stale", "overflow", "crash", "failed", "invalid"]
"""shed: given up under overload. closed: its session was closed while it was under way. failed: the stage that had it
raised at it, or had given its session up. invalid: the receiver could not read it."""
REASONS: tuple[Reason, ...] = get_args(Reason)


@value
class Account:
    """The sums of one edge. `in_flight` is what is not accounted for yet: 0 once the edge is drained."""

    accepted: int = 0
    delivered: int = 0
    dropped: Mapping[Reason, int] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        return self.accepted - self.delivered - sum(self.dropped.values())

    def as_dict(self) -> dict[str, object]:
        """For ledger.json."""
        dropped = {reason: self.dropped.get(reason, 0) for reason in REASONS}
        return {
            "accepted": self.accepted,
            "delivered": self.delivered,
            "dropped": dropped,
            "in_flight": self.in_flight,
        }


class Ledger:
    """One end's running sums for one edge."""

    def __init__(self) -> None:
        self._accepted = 0
        self._delivered = 0
        self._dropped: dict[Reason, int] = dict.fromkeys(REASONS, 0)

    def accept(self, number: int = 1) -> None:
        self._accepted += number

    def deliver(self, number: int = 1) -> None:
        self._delivered += number

    def drop(self, reason: Reason, number: int = 1) -> None:
        self._dropped[reason] += number

    def account(self) -> Account:
        """A frozen copy of the sums."""
        return Account(self._accepted, self._delivered, dict(self._dropped))


def merge(accounts: Iterable[Account]) -> Account:
    """Add up the ends (and replicas) of one edge."""
    accepted = delivered = 0
    dropped: dict[Reason, int] = dict.fromkeys(REASONS, 0)
    for account in accounts:
        accepted += account.accepted
        delivered += account.delivered
        for reason, count in account.dropped.items():
            dropped[reason] += count
    return Account(accepted, delivered, dropped)
