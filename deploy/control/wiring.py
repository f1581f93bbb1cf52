"""Who is wired to whom: the endpoints of every edge, as they are now. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from deploy.actor.plan import Address
from deploy.control.placement import Process
from graph.spec import PipelineSpec


class Wiring:
    """Per edge and receiving replica the endpoint; per actor where it is, or was last."""

    def __init__(self, spec: PipelineSpec, processes: Sequence[Process]) -> None:
        self._edges = spec.edges
        self._processes = processes
        self._endpoints: dict[str, dict[int, str]] = {edge.id: {} for edge in spec.edges}
        self._addresses: dict[str, Address] = {}

    def is_at(self, process: Process, address: Address) -> None:
        """An actor has started there."""
        self._addresses[process.name] = address

    def is_bound(self, process: Process, endpoints: Mapping[str, str]) -> None:
        """An actor has opened the receiving ends of its edges."""
        for edge, endpoint in endpoints.items():
            self._endpoints[edge][process.replica] = endpoint

    def over_tcp(self, process: Process) -> dict[str, bool]:
        """The edges that come to it, and whether one of their senders is on another node."""
        here = self._addresses[process.name].node_id
        return {
            edge.id: any(
                self._addresses[other.name].node_id != here
                for other in self._processes
                if edge.source.stage in other.stages
            )
            for edge in self._edges
            if edge.target.stage in process.stages
        }

    def outgoing(self, process: Process) -> dict[str, list[str]]:
        """The edges that leave it, with the endpoints of all replicas at the other end."""
        outgoing = [edge.id for edge in self._edges if edge.source.stage in process.stages]
        return {edge: [endpoint for _, endpoint in sorted(self._endpoints[edge].items())] for edge in outgoing}

    def moved(self, process: Process, before: Mapping[str, list[str]]) -> list[tuple[str, int, str]]:
        """The ends of its outgoing edges that have been replaced since, with their replicas and endpoints."""
        return [
            (edge, replica, endpoint)
            for edge, endpoints in self.outgoing(process).items()
            for replica, endpoint in enumerate(endpoints)
            if endpoint != before[edge][replica]
        ]

    def outgoing_to_others_than(self, process: Process, living: Collection[str]) -> list[tuple[str, int]]:
        """The edges that leave it for an actor that is down, and for which replica. living: names of actors."""
        return [
            (edge.id, other.replica)
            for edge in self._edges
            for other in self._processes
            if edge.source.stage in process.stages
            and edge.target.stage in other.stages
            and other.name not in (*living, process.name)
        ]

    def between(self, sender: Process, receiver: Process) -> list[tuple[str, int, str]]:
        """The edges from one to the other, with the receiving replica and its endpoint."""
        return [
            (edge.id, receiver.replica, self._endpoints[edge.id].get(receiver.replica, ""))
            for edge in self._edges
            if edge.source.stage in sender.stages and edge.target.stage in receiver.stages
        ]
