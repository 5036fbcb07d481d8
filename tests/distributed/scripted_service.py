"""A real gRPC server that generates made-up tokens and fails where a test tells it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field

import grpc

from cluster.v1 import generation_pb2, generation_pb2_grpc

WEIGHTS_VERSION = 7
DRAWN_SEED = 4242
DRAWN_REQUEST_ID = "drawn-by-the-service"


def made_up_token(seed: int, choice_index: int, position: int) -> int:
    """As with the real thing: a function of seed, choice and position alone."""
    return (seed * 31 + choice_index * 7 + position * position) % 1000


@dataclass
class Script:
    """fail[i] is called in the i-th Generate call after fail_after[i] tokens; it breaks the stream."""

    fail: list[Callable[[grpc.ServicerContext], None]] = field(default_factory=list)
    fail_after: list[int] = field(default_factory=list)
    requests: list[generation_pb2.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)


class ScriptedService(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateResponse]:
        call = len(self._script.requests)
        self._script.requests.append(request)
        self._script.metadata.append(dict(context.invocation_metadata()))
        for num_sent, response in enumerate(responses_to(request)):
            # The first response holds no token.
            if call < len(self._script.fail) and num_sent - 1 == self._script.fail_after[call]:
                self._script.fail[call](context)
                return
            yield response

    def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> generation_pb2.TokenizeResponse:
        if not request.text:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "text must not be empty")
        return generation_pb2.TokenizeResponse(token_ids=request.text.encode())

    def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> generation_pb2.DetokenizeResponse:
        return generation_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())


def responses_to(request: generation_pb2.GenerateRequest) -> Iterator[generation_pb2.GenerateResponse]:
    """The stream that generation.proto promises: what the client has is not sent again."""
    seed = request.seed if request.HasField("seed") else DRAWN_SEED
    yield generation_pb2.GenerateResponse(
        request_id=request.request_id or DRAWN_REQUEST_ID, seed=seed, weights_version=WEIGHTS_VERSION
    )
    resumed = {choice.choice_index: choice for choice in request.resume_token_ids}
    max_tokens = request.sampling.max_tokens
    started = {index: len(choice.token_ids) for index, choice in resumed.items()}
    last = request.n - 1 if request.HasField("n") else 0
    for position in range(max_tokens):
        for choice_index in range(last + 1):
            if position < started.get(choice_index, 0) or (choice_index in resumed and resumed[choice_index].finished):
                continue
            token_id = made_up_token(seed, choice_index, position)
            response = generation_pb2.GenerateResponse(
                choice_index=choice_index, token_ids=[token_id], text=f"{token_id} "
            )
            if position == 0 and choice_index == 0 and request.sampling.HasField("prompt_logprobs"):
                response.prompt_logprobs.add(token_id=1, logprob=-0.5, top_token_ids=[1, 2], top_logprobs=[-0.5, -2.0])
            if position == max_tokens - 1:
                response.finish_reason = generation_pb2.FINISH_REASON_LENGTH
                if choice_index == last:
                    response.usage.CopyFrom(generation_pb2.Usage(prompt_tokens=3, completion_tokens=max_tokens))
            yield response


def start(script: Script) -> tuple[grpc.Server, int]:
    """A server of the script and its port."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(ScriptedService(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port
