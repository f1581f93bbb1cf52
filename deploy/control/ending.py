"""The last ledger of a run, whoever still answers.

Rule: it is exact. Actors that answer say their last word after all sessions were closed. Of one that hangs, what it
reported last stands; it has died for the ledger, and those who sent to it count what was under way as `crash`.
"""

from __future__ import annotations

from collections.abc import Sequence

from deploy.control.calls import CoordinatorError
from deploy.control.fleet import Living
from deploy.control.restarts import Tools
from deploy.process.deadline import Deadline
from graph.ledger import Account

HANGS_S = 3.0  # who has not answered for so long when it ends is not asked any more


def last_ledger(tools: Tools, deadline: Deadline) -> dict[str, Account]:
    """Once all sessions were closed. Takes as long as actors take to answer, and most of the time that is left at most:
    on a busy machine that is long, and who is killed in it leaves files that are not whole."""
    living = tools.fleet.living
    _give_up(tools, [each for each in living.values() if each.line.silent_s > HANGS_S])
    _ask_for_last_reports(tools, deadline)
    silent = [each for each in living.values() if each.asked is not None or each.line.error is not None]
    if silent:
        _give_up(tools, silent)
        _ask_for_last_reports(tools, deadline)
    return ledger_of(tools)


def ledger_of(tools: Tools) -> dict[str, Account]:
    """The account of every edge, both ends and all replicas put together, as reported last."""
    return tools.accounts.of(edge.id for edge in tools.spec.edges)


def take_reports(tools: Tools) -> None:
    """Those that have come, into the accounts."""
    for peer, ends in tools.fleet.take_reports().items():
        tools.accounts.told(peer, ends)


def _give_up(tools: Tools, silent: Sequence[Living]) -> None:
    for living in silent:
        tools.fleet.remove(living)
        tools.accounts.died(living.peer, ())
        living.line.fail(CoordinatorError(f"{living.process.name} did not answer at the end"))
    for other in tools.fleet.living.values():
        for living in silent:
            if ends := [end[:2] for end in tools.wiring.between(other.process, living.process)]:
                other.line.post("bury", ends)
                tools.accounts.died(living.peer, [other.peer])


def _ask_for_last_reports(tools: Tools, deadline: Deadline) -> None:
    """Reports that were asked for from now on; who gives none in time stays asked."""
    deadline = deadline.share(deadline.left_s / 2)
    for _ in range(2):  # one that is under way already does not know the last of it
        reports = tools.fleet.ask_for_reports()
        while not (all(report.is_done for report in reports) or deadline.is_over):
            tools.lines.look(deadline.left_s)
        take_reports(tools)
