"""The load over the OpenAI API. An edge: it only forwards."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from cluster.bench.open_loop import Ask, AskFailedError

DATA = b"data: "
DONE = b"[DONE]"


class HttpLoad:
    """url: of the service, without a path. Use ``open``."""

    def __init__(self, url: str, session: aiohttp.ClientSession, model: str) -> None:
        self._url = url
        self._session = session
        self._model = model

    @classmethod
    async def open(cls, url: str) -> HttpLoad:
        """Raises AskFailedError when the service does not say what it serves."""
        # As many connections as there are answers under way, for as long as those take.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        try:
            async with session.get(f"{url}/v1/models") as response:
                response.raise_for_status()
                models = await response.json()
            return cls(url, session, models["data"][0]["id"])
        except (aiohttp.ClientError, KeyError, IndexError) as error:
            await session.close()
            raise AskFailedError(f"{url}/v1/models: {error}") from error

    async def answer(self, ask: Ask) -> AsyncIterator[int]:
        body = {
            "model": self._model,
            "prompt": list(ask.prompt_ids),
            "max_tokens": ask.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise AskFailedError(f"{response.status}: {(await response.text()).strip()}")
                async for line in response.content:
                    if line.startswith(DATA) and (count := _num_tokens(line.removeprefix(DATA).strip())):
                        yield count
        except aiohttp.ClientError as error:
            raise AskFailedError(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        await self._session.close()


def _num_tokens(event: bytes) -> int:
    """Raises AskFailedError for an event that tells of an error."""
    if event == DONE:
        return 0
    message: dict[str, Any] = json.loads(event)
    if "error" in message:
        raise AskFailedError(json.dumps(message["error"]))
    return sum(len(choice.get("token_ids") or ()) for choice in message["choices"])
