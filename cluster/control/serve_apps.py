"""What Ray Serve says about our application."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE


class ServeApps:
    """Asks Serve's own controller. serve.status() would do the same, but blocks, and keeps a dead client."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def is_present(self, app_name: str) -> bool | None:
        """Whether Serve knows the application, in whatever state; None when Serve does not answer."""
        try:
            details = await self._details()
        except RayError:
            return None
        except TimeoutError:
            return None
        return details is not None and app_name in details["applications"]

    async def ports(self) -> tuple[int, int] | None:
        """(HTTP port, gRPC port) on which Serve listens; None when Serve is not there."""
        details = await self._details()
        if details is None:
            return None
        return details["http_options"]["port"], details["grpc_options"]["port"]

    async def _details(self) -> dict[str, Any] | None:
        """None when Serve itself is gone. Raises RayError or TimeoutError when it does not answer."""
        try:
            controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            async with asyncio.timeout(self._timeout_s):
                details: dict[str, Any] = await controller.get_serve_instance_details.remote()
        except (ValueError, ActorDiedError):
            return None
        return details
