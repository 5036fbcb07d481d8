"""Which router a request goes to, as Serve asks it: see router_ranks.py."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.front.router_ranks import RouterRanks


class RouterChoice(FIFOMixin, RequestRouter):
    """FIFO: Serve (2.60) would else tell calls apart by the id of the request that they belong to, which the choices of
    one request share, and leave all but one waiting. So a router that was chosen for one call may get an older one;
    all calls of a gateway shun the same, and what counts as sent to a router is what went there."""

    def initialize_state(self, **ranks: Any) -> None:
        """Called by Serve with the deployment's request_router_kwargs: arguments of RouterRanks."""
        self._ranks = RouterRanks(**ranks)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve asks those of a rank for their queues and takes the shortest, where it is not full; then the next
        rank, and comes again if all refuse."""
        call: dict[Any, Any] = {}
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            call = pending_request.kwargs
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) for name, replica in replicas.items()}
        shun = set(call.get("shun", ()))
        shunned = [name for name, replica in replicas.items() if name in shun or replica.node_id in shun]
        ranks = self._ranks.ranks(loads, shunned=shunned, prefix=call.get("prefix", b""))
        return [[replicas[name] for name in rank] for rank in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a replica has taken the request."""
        self._ranks.note_routed(replica_id.unique_id, pending_request.kwargs.get("prefix", b""))
