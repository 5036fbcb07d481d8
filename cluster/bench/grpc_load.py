"""The load over gRPC. An edge: it only forwards."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio

from cluster.bench.open_loop import Ask, AskFailedError
from cluster.client import CHANNEL_OPTIONS
from cluster.v1 import generation_pb2, generation_pb2_grpc


class GrpcLoad:
    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)])
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def answer(self, ask: Ask) -> AsyncIterator[int]:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=ask.prompt_ids),
            sampling=generation_pb2.SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True),
        )
        try:
            async for response in self._stub.Generate(request):
                if response.token_ids:
                    yield len(response.token_ids)
        except grpc.aio.AioRpcError as error:
            raise AskFailedError(f"{error.code().name}: {error.details()}") from error

    async def close(self) -> None:
        await self._channel.close()
