"""What the tests of the engine process share: starting one, requests for it, and looking at processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from cluster.front.token_listener import TokenListener
from router.engine_client import EngineClient
from router.messages import EngineSettings, Finished, GenerateRequest, Start
from router.sampling_params import SamplingParams

SECRET = b"the secret of the tests"
READY_S = 30.0
CLOSE_S = 2.0


def start_message(model: str = "scripted", **settings: object) -> Start:
    return Start(
        router_id="router-a",
        settings=EngineSettings(model=model, dtype="float32", max_model_len=128, **settings),  # type: ignore[arg-type]
        secret=SECRET,
        weights_version=0,
        epoch=None,
    )


@contextmanager
def running_engine(on_death: Callable[[str], None] | None = None) -> Iterator[EngineClient]:
    """A ready scripted engine; it is gone afterwards."""
    client = EngineClient(module="scripted_engine", on_death=on_death)
    try:
        client.start(start_message(), READY_S)
        yield client
    finally:
        client.close(CLOSE_S)
        assert has_gone(client.pid)


@asynccontextmanager
async def listening(secret: bytes = SECRET) -> AsyncIterator[TokenListener]:
    listener = TokenListener(host="127.0.0.1", secret=secret)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.close()


def request(
    request_id: str, first: int, *, address: str, max_tokens: int = 1_000_000, attempt: int = 0
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        attempt=attempt,
        prompt_ids=[first],
        params=SamplingParams(max_tokens=max_tokens),
        return_address=address,
    )


async def answer(engine: EngineClient, listener: TokenListener, asked: GenerateRequest) -> Finished:
    """How a request ends whose tokens are waited for."""
    with listener.open(asked.request_id, asked.attempt) as stream:
        call = asyncio.create_task(engine.generate(asked))
        async for _output in stream:
            pass
        return await call


def has_gone(pid: int) -> bool:
    """Ended; a zombie waiting for its parent counts."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat[stat.rindex(")") + 2] in "ZX"


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


async def wait_until_async(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def num_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))
