"""Whether the process behind an actor handle still lives."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import ActorDiedError, RayError


class RayProbe:
    """Ray fails a call to an actor at once when the actor's process has ended; what it answers does not matter."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def has_died(self, process: Any) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s):
                await process.__ray_ready__.remote()
        except ActorDiedError:
            return True
        except (RayError, TimeoutError):
            return False
        return False
