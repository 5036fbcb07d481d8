"""A Python client of the service.

with ArrieroClient("localhost:9000") as client:
    for piece in client.generate("Where do llamas live?", sampling=Sampling(max_tokens=64)):
        print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from cluster.client_codec import Prompt, generate_request, policy_value, set_prompt
from cluster.client_stream import Call, GenerationStream, error_of
from cluster.client_types import MissingExpertPolicy, RetryPolicy, Sampling
from cluster.front.chat import ChatMessage
from cluster.v1 import generation_pb2, generation_pb2_grpc

CHANNEL_OPTIONS = (
    # Log probabilities of a whole vocabulary exceed gRPC's default of 4 MB.
    ("grpc.max_receive_message_length", -1),
    # A host that vanished without a word is noticed. Servers refuse clients that ask more than every 5 minutes.
    ("grpc.keepalive_time_ms", 305_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Each stream has its own back-off; the connection below should be there as soon as a server is.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class ArrieroClient:
    """Calls one service. Methods raise ArrieroError; they may be called from several threads.

    address: "host:port", or a list of gateways in gRPC's form "ipv4:10.0.0.1:9000,10.0.0.2:9000".
    application: the Serve application to ask, needed only where several share a cluster.
    credentials: for a service behind a proxy that speaks TLS.
    """

    def __init__(
        self,
        address: str,
        *,
        application: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._metadata = () if application is None else (("application", application),)
        self._retry = RetryPolicy() if retry is None else retry

    def generate(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        n: int | None = None,
        seed: int | None = None,
        request_id: str = "",
        on_missing_expert: MissingExpertPolicy | None = None,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> GenerationStream:
        """Streams the continuations of a text, of token ids or of chat messages.

        A broken stream is resumed, so that each token comes exactly once. timeout_s is the time for all of
        it, resumptions included; None sets no limit but the retry policy's. Raises ValueError or TypeError
        for what cannot be sent at all; what the service refuses is raised by the stream.
        """
        request = generate_request(prompt, Sampling() if sampling is None else sampling)
        request.request_id = request_id
        request.cache_salt = cache_salt
        if n is not None:
            request.n = n
        if seed is not None:
            request.seed = seed
        if on_missing_expert is not None:
            request.on_missing_expert = policy_value(on_missing_expert)
        return GenerationStream(self._open_generate, request, retry=self._retry, timeout_s=timeout_s)

    def tokenize(self, prompt: str | Sequence[ChatMessage], *, timeout_s: float | None = 30.0) -> tuple[int, ...]:
        """The token ids that generate would make of a text or of chat messages."""
        request = generation_pb2.TokenizeRequest()
        set_prompt(request, prompt)
        try:
            response = self._stub.Tokenize(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return tuple(response.token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, keep_special_tokens: bool = False, timeout_s: float | None = 30.0
    ) -> str:
        """The text of token ids, with the special ones written out or left away."""
        request = generation_pb2.DetokenizeRequest(token_ids=token_ids, keep_special_tokens=keep_special_tokens)
        try:
            response = self._stub.Detokenize(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return response.text

    def close(self) -> None:
        """Closes the connection; streams still open end with an error."""
        self._channel.close()

    def __enter__(self) -> ArrieroClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_generate(self, request: generation_pb2.GenerateRequest, timeout_s: float | None) -> Call:
        return self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
