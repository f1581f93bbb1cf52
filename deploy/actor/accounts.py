"""The ledgers of all actors put together, those of the dead included. Pure.

Rule: on every edge `accepted = delivered + dropped + in flight` holds exactly, whoever dies when. Of an actor that has
died there is what it told last. What is missing since is known from its neighbours: who sent to it says how much it had
done with (`Sender.bury()`), who received from it says how much has come (`Receiver.arrived`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field

from graph.ledger import Account, Reason, merge
from graph.value import value

NOTHING = Account()


@value
class EdgeEnds:
    """One actor's ends of one edge, over all replicas of the other stage. arrived: data chunks, by who sent them."""

    sent: Account = NOTHING
    received: Account = NOTHING
    arrived: Mapping[str, int] = field(default_factory=dict)


NO_ENDS = EdgeEnds()


class Accounts:
    """What every actor has told of its edges last. An actor is known by its name on the bus."""

    def __init__(self) -> None:
        self._reported: dict[str, Mapping[str, EdgeEnds]] = {}
        self._dead: set[str] = set()
        self._buried: set[tuple[str, str]] = set()  # (by whom, who)

    def reported(self, actor: str, ends: Mapping[str, EdgeEnds]) -> None:
        """ends: by edge."""
        self._reported[actor] = ends

    def died(self, actor: str, buried_by: Iterable[str]) -> None:
        """buried_by: the actors that sent to it and live; what they tell from now on has it that it is dead."""
        self._dead.add(actor)
        self._buried |= {(other, actor) for other in buried_by}

    def of(self, edges: Iterable[str]) -> dict[str, Account]:
        """The accounts of these edges."""
        ends: dict[str, list[Account]] = {edge: [] for edge in edges}
        for actor in self._reported.keys() - self._dead:
            for edge, each in self._reported[actor].items():
                ends[edge] += [account for account in (each.sent, each.received) if account is not NOTHING]
        for edge, accounts in ends.items():
            for actor in self._dead:
                accounts += [self._sent_by_dead(actor, edge), _named(self._ends(actor, edge).received)]
        return {edge: merge(accounts) for edge, accounts in ends.items()}

    def _sent_by_dead(self, actor: str, edge: str) -> Account:
        """What had left it and has not come anywhere is lost; what has come and it had not told of yet was accepted."""
        sent = self._ends(actor, edge).sent
        unburied = self._arrived(actor, edge, [dead for dead in self._dead if (actor, dead) not in self._buried])
        seen = unburied + self._arrived(actor, edge, self._reported.keys() - self._dead)
        left = sent.in_flight - seen
        dropped: dict[Reason, int] = {**sent.dropped, "crash": sent.dropped.get("crash", 0) + max(left, 0)}
        return Account(sent.accepted + max(-left, 0), sent.delivered + unburied, dropped)

    def _arrived(self, sender: str, edge: str, receivers: Iterable[str]) -> int:
        return sum(self._ends(receiver, edge).arrived.get(sender, 0) for receiver in receivers)

    def _ends(self, actor: str, edge: str) -> EdgeEnds:
        return self._reported.get(actor, {}).get(edge, NO_ENDS)


def _named(received: Account) -> Account:
    """Whoever sent to a dead actor counts as delivered all that it had done with; some of it was dropped there."""
    return Account(0, -sum(received.dropped.values()), received.dropped)
