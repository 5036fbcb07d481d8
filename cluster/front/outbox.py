"""What has come for one client since it was last served."""

from __future__ import annotations

import asyncio

from cluster.front.journal import Delta


class Outbox:
    """Merges the news of each choice. The first news of a choice is urgent: it does not wait."""

    def __init__(self) -> None:
        self._deltas: dict[int, Delta] = {}
        self._begun: set[int] = set()
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()

    def put(self, delta: Delta) -> None:
        earlier = self._deltas.get(delta.choice_index)
        self._deltas[delta.choice_index] = delta if earlier is None else earlier.followed_by(delta)
        if delta.choice_index not in self._begun:
            self._begun.add(delta.choice_index)
            self._urgent.set()
        self._news.set()

    def wake(self) -> None:
        """There is something to see besides tokens: a choice has ended."""
        self._urgent.set()
        self._news.set()

    def take(self) -> list[Delta]:
        deltas = list(self._deltas.values())
        self._deltas.clear()
        self._news.clear()
        self._urgent.clear()
        return deltas

    async def wait(self, earliest_s: float) -> None:
        """Returns when there is news and either earliest_s (of the loop's clock) has come or it is urgent."""
        await self._news.wait()
        delay_s = earliest_s - asyncio.get_running_loop().time()
        if delay_s > 0:
            try:
                async with asyncio.timeout(delay_s):
                    await self._urgent.wait()
            except TimeoutError:
                return
