"""Work that runs beside an event loop's main thread of thought: one task of a kind at a time, all ended together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

logger = logging.getLogger("arriero.controller")


class BackgroundTasks:
    def __init__(self, on_end: Callable[[], None]) -> None:
        """on_end is called after each task."""
        self._on_end = on_end
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}

    def begin(self, kind: Hashable, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Starts the work unless its like is under way. A failure is logged: whoever begins it does not wait."""
        if kind in self._tasks:
            return
        task = asyncio.create_task(work())
        self._tasks[kind] = task
        task.add_done_callback(lambda task: self._end(kind, task))

    async def stop(self) -> None:
        """Cancels what is under way and returns when it has ended."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, kind: Hashable, task: asyncio.Task[None]) -> None:
        del self._tasks[kind]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", kind, exc_info=error)
        self._on_end()
