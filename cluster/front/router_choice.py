"""Which router a request goes to, as Serve asks it: the less busy one of two drawn at random, as Serve itself does it,
but none that the call wants to shun, as long as there are others."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class RouterChoice(FIFOMixin, RequestRouter):
    """FIFO: Serve (2.60) would else tell calls apart by the id of the request that they belong to, which the choices of
    one request share, and leave all but one waiting. So a router that was chosen for one call may get an older one;
    all calls of a gateway shun the same."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve asks these for their queues, takes the shorter one, and comes again if both refuse."""
        shunned = set()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            shunned = set(pending_request.kwargs.get("shun", ()))
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id not in shunned]
        eligible = others or candidate_replicas
        return [random.sample(eligible, min(2, len(eligible)))]
