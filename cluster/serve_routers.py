"""The routers as a Serve deployment: one handle call per choice, open until the choice has ended."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from cluster.relay import CallEnd, QueueFullError, RouterLostError
from router.messages import GenerateRequest, decode_finished, encode

logger = logging.getLogger("arriero.gateway")


class ServeRouters:
    """See cluster.relay.Routers. handle: Serve's, of the router deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def generate(self, request: GenerateRequest) -> CallEnd:
        response = self._handle.generate.remote(encode(request))
        try:
            end = decode_finished(await response)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise QueueFullError(error.message) from None
        except (RayError, RayServeException) as error:
            # Died, stopped, dropped the call or failed in it: in every case another router can take over.
            logger.warning("%s: lost its router: %s", request.request_id, error)
            raise RouterLostError(f"the router is lost: {type(error).__name__}") from None
        return CallEnd(finish_reason=end.finish_reason, error=end.error, error_code=end.error_code)
