"""How a pipeline's actors start: all of them are placed, wired, and load their models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploy.control.calls import Reply
from deploy.control.fleet import Living
from deploy.control.placement import Process
from deploy.control.restarts import START_TIMEOUT_S, Tools
from deploy.control.watch import Waiting

LOOK_S = 0.2  # a look takes at most so long, whoever does not answer


def start_actors(tools: Tools, processes: Sequence[Process]) -> None:
    """Place the actors, wire them, load their models.

    Raises PlacementError, CoordinatorError, or what a stage raises when it can't be built.
    """
    handles = tools.cluster.place(processes, [tools.plan(process) for process in processes])
    lines = {name: tools.lines.open(name, handle, START_TIMEOUT_S) for name, handle in handles.items()}

    def post(method: str, arguments: Callable[[Process], Sequence[object]]) -> dict[str, Reply[Any]]:
        return {p.name: lines[p.name].post(method, *arguments(p)) for p in processes}

    addresses = _wait_for(tools, "start", post("address", lambda process: []))
    for process in processes:
        address = addresses[process.name]
        tools.wiring.is_at(process, address)
        tools.fleet.add(Living(process, lines[process.name], tools.plan(process).peer, address))
    bound = _wait_for(tools, "bind", post("bind", lambda process: [tools.wiring.over_tcp(process)]))
    for process in processes:
        tools.wiring.is_bound(process, bound[process.name])
    post("connect", lambda process: [tools.wiring.outgoing(process)])

    def is_ready(name: str, runs_with: str | None) -> None:
        tools.tell(f"  {name} ready ({runs_with})" if runs_with else f"  {name} ready")

    _wait_for(tools, "load", post("load", lambda process: []), is_ready)


def _wait_for(
    tools: Tools,
    what: str,
    replies: Mapping[str, Reply[Any]],
    is_there: Callable[[str, Any], None] = lambda name, answer: None,
) -> dict[str, Any]:
    """All answers, by actor. what: they are to do. is_there: called with each as it comes."""
    answers: dict[str, Any] = {}
    waiting = Waiting(what, tools.tell, tools.now_s)
    while len(answers) < len(replies):
        tools.lines.look(LOOK_S)
        for name, reply in replies.items():
            if reply.is_done and name not in answers:
                answers[name] = reply.result()
                is_there(name, answers[name])
        waiting.look(name for name in replies if name not in answers)
    return answers
