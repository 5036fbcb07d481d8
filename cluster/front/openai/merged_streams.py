"""The streams of several prompts as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cluster.front.generate_call import Chunk


async def merged(streams: Sequence[AsyncGenerator[Chunk]]) -> AsyncGenerator[tuple[int, Chunk]]:
    """Each chunk with its stream's index, as they come; all streams run at once. Raises what the first one to fail
    raises. However the iteration ends, every stream is left."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for chunk in only:
                yield 0, chunk
        return
    waiting = {asyncio.create_task(_next_of(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                following = task.result()
                if following is not None:
                    waiting[asyncio.create_task(_next_of(streams[index]))] = index
                    yield index, following
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*(stream.aclose() for stream in streams))


async def _next_of(stream: AsyncGenerator[Chunk]) -> Chunk | None:
    return await anext(stream, None)
