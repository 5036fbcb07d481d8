"""The routers as a Serve deployment: one handle call per choice, open until the choice has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from cluster.front.errors import ServiceError, StatusCode
from cluster.front.prefix_index import prefix_keys
from cluster.front.relay import CallEnd, QueueFullError, RouterLostError
from router.messages import GenerateRequest, decode_finished, encode

# How many looks at the routers fit into the time for which there may be none.
NUM_LOOKS = 4
# For how long nothing is asked of a router that has said that its engine is silent, or gone: then it ends itself soon.
SHUN_S = 1.0


class ServeRouters:
    """See cluster.front.relay.Routers."""

    def __init__(
        self,
        handle: Any,
        *,
        num_ready: Callable[[], int],
        absence_timeout_s: float,
        draining_nodes: Callable[[], Sequence[str]] = tuple,
        prefix_block_size: int | None = None,
    ) -> None:
        """handle: Serve's, of the router deployment. num_ready: how many routers there are. draining_nodes:
        nodes that are to go, whose routers get nothing while there are others. prefix_block_size: of the
        blocks by which a router is chosen that has the beginning of a prompt; None: that does not count.

        A handle keeps calls for as long as there is no replica to take them; we only absence_timeout_s.
        """
        self._prefix_block_size = prefix_block_size
        self._draining_nodes = draining_nodes
        self._handle = handle
        self._num_ready = num_ready
        self._absence_timeout_s = absence_timeout_s
        self._shunned_until: dict[str, float] = {}

    async def generate(self, request: GenerateRequest) -> CallEnd:
        call = asyncio.create_task(self._call(request))
        num_absences = 0
        try:
            while not call.done():
                await asyncio.wait([call], timeout=self._absence_timeout_s / NUM_LOOKS)
                num_absences = 0 if self._num_ready() else num_absences + 1
                if num_absences > NUM_LOOKS:
                    raise ServiceError(StatusCode.UNAVAILABLE, "no router is ready: try again")
            return call.result()
        finally:
            call.cancel()

    async def _call(self, request: GenerateRequest) -> CallEnd:
        response = self._handle.generate.remote(
            encode(request),
            weights_version=request.weights_version,
            shun=self._shunned(),
            prefix=self._prefix(request),
        )
        try:
            end = decode_finished(await response)
        except asyncio.CancelledError:
            # Serve (2.60) may lose this while the call is on its way to a replica. The router then hears that nobody
            # wants the request when it says that it has it: see TokenListener.
            response.cancel()
            raise
        except BackPressureError as error:
            raise QueueFullError(error.message) from None
        except (RayError, RayServeException) as error:
            # Died, stopped, dropped the call or failed in it: in every case another router can take over.
            cause = getattr(error, "cause", None)
            raise RouterLostError(f"the router is lost: {cause or type(error).__name__}") from None
        if end.suspect is not None:
            self._shunned_until[end.suspect] = time.monotonic() + SHUN_S
        return CallEnd(finish_reason=end.finish_reason, error=end.error, error_code=end.error_code)

    def _prefix(self, request: GenerateRequest) -> bytes:
        """Empty where it decides nothing: of prompts whose log probabilities are asked for every token is computed."""
        if self._prefix_block_size is None or self._num_ready() < 2 or request.params.num_prompt_logprobs is not None:
            return b""
        token_ids = [*request.prompt_ids, *request.resume_ids]
        return prefix_keys(
            token_ids,
            block_size=self._prefix_block_size,
            weights_version=request.weights_version,
            cache_salt=request.cache_salt,
        )

    def _shunned(self) -> list[str]:
        now = time.monotonic()
        self._shunned_until = {name: until for name, until in self._shunned_until.items() if until > now}
        return [*self._shunned_until, *self._draining_nodes()]
