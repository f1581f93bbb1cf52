"""What Ray reads from the environment when it is imported; so it must be set before that."""

from __future__ import annotations

import os
import secrets

from deploy.process.children import environment_for_children


def prepare(address: str | None) -> None:
    """Set up the environment for a Ray of our own (address None), or for joining one, whose token the user gives.

    A Ray of our own listens on the loopback, whatever `_node_ip_address` says, only where it is told that this machine
    is in no cluster (a switch made for Windows and macOS). Other users of the machine are kept out by token
    authentication, set explicitly and with a token of this run's own. Ray's processes and our actors inherit what is
    here; nothing of it lets them run what is not ours.

    Our actors run at the priority of any other program. Ray would make them 15 steps nicer: then speech is late as soon
    as anything else computes on the machine.
    """
    for_children = environment_for_children(os.environ)
    for name in os.environ.keys() - for_children.keys():
        del os.environ[name]
    os.environ.update(for_children)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")  # a history of calls, which nobody reads here
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once per process
