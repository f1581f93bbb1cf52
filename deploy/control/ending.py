"""The last ledger of a run, whoever still answers.

Rule: it is exact. Actors that answer say their last word after all sessions were closed. Of one that hangs, what it
reported last stands; it has died for the ledger, and those who sent to it count what was under way as `crash`. So has
one that does not answer that call, until all that are left have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.control.calls import CoordinatorError, Reply
from deploy.control.fleet import Living
from deploy.control.restarts import Tools
from deploy.process.deadline import Deadline
from graph.chunk import NS_PER_S
from graph.ledger import Account
from graph.spec import PipelineSpec

# From the first signal to the end of the process, whatever hangs; most of it is for a listener who still hears. What is
# left is for the last word of all actors, for stopping them, and for Ray.
END_S, DRAIN_S = 10.0, 5.0
CLOSING_S = 1.0  # after the last word
HANGS_S = 3.0  # who has not answered for so long when it ends is not asked any more


def drain_s(spec: PipelineSpec) -> float:
    """How long sessions may take to their end once the run is to end: a listener has a lead and a window to hear, after
    the last word is made, which may be late by as much as a window may. One who hears nothing is not waited for any
    longer."""
    rest_ns = 2 * spec.window.length_ns + spec.window.lateness_ns + spec.tail.lead_ns
    return max(DRAIN_S, rest_ns / NS_PER_S + CLOSING_S)


def last_ledger(tools: Tools, deadline: Deadline) -> dict[str, Account]:
    """Once all sessions were closed. Takes as long as actors take to answer, and most of the time that is left at most:
    on a busy machine that is long, and who is killed in it leaves files that are not whole."""
    living = tools.fleet.living
    burials = _give_up(tools, [each for each in living.values() if each.line.silent_s > HANGS_S])
    _ask_twice(tools, burials, deadline)
    while not deadline.is_over or _silent(tools):
        if silent := _silent(tools):
            burials += _give_up(tools, silent)
            _ask_twice(tools, burials, deadline)
        elif not _is_in_flight(tools):
            break
        else:
            _ask_for_reports(tools, burials, deadline)
            if deadline.is_over:  # all have answered twice
                break
    return ledger_of(tools)


def ledger_of(tools: Tools) -> dict[str, Account]:
    """The account of every edge, both ends and all replicas put together, as reported last."""
    return tools.accounts.of(edge.id for edge in tools.spec.edges)


def take_reports(tools: Tools) -> None:
    """Those that have come, into the accounts."""
    for peer, ends in tools.fleet.take_reports().items():
        tools.accounts.reported(peer, ends)


@dataclass(frozen=True, slots=True)
class _Burial:
    """Of a dead actor by one that sent to it. Both by their names on the bus."""

    dead: str
    by: str
    reply: Reply[None]


def _give_up(tools: Tools, silent: Sequence[Living]) -> list[_Burial]:
    """They have died for the ledger; those that sent to them are to bury them."""
    for living in silent:
        tools.fleet.remove(living)
        tools.accounts.died(living.peer, ())
        living.line.fail(CoordinatorError(f"{living.process.name} did not answer at the end"))
    return [
        _Burial(living.peer, other.peer, other.line.post("bury", ends))
        for other in tools.fleet.living.values()
        for living in silent
        if (ends := [end[:2] for end in tools.wiring.between(other.process, living.process)])
    ]


def _silent(tools: Tools) -> list[Living]:
    return [
        each for each in tools.fleet.living.values() if each.pending_report is not None or each.line.error is not None
    ]


def _ask_twice(tools: Tools, burials: Sequence[_Burial], deadline: Deadline) -> None:
    """Reports that were asked for from now on; who gives none in time stays asked."""
    deadline = deadline.share(deadline.left_s / 2)
    for _ in range(2):  # one that is under way already does not know the last of it
        _ask_for_reports(tools, burials, deadline)


def _ask_for_reports(tools: Tools, burials: Sequence[_Burial], deadline: Deadline) -> None:
    reports = tools.fleet.ask_for_reports()
    while not (all(report.is_done for report in reports) or deadline.is_over):
        tools.lines.look(deadline.left_s)
    take_reports(tools)
    for burial in burials:
        if burial.reply.is_done and burial.reply.error is None:  # what has been reported since has it
            tools.accounts.died(burial.dead, [burial.by])


def _is_in_flight(tools: Tools) -> bool:
    """An actor in a long batch sends what it has made and closes its sessions after others have reported: then what it
    has sent is on its way, and all report again."""
    return any(account.in_flight for account in ledger_of(tools).values())
