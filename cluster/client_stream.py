"""The client's end of one generation, whatever becomes of the connections that carry it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import grpc

from cluster.client_codec import piece_of
from cluster.client_received import Received
from cluster.client_types import ArrieroError, Piece, RetryPolicy
from cluster.v1 import generation_pb2

# A gateway or proxy that dies in mid-stream shows itself as any of these. Sending again is safe whatever the
# cause, because a resumed stream has no effect but the rest of its tokens.
BROKEN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
    }
)


class Call(Protocol):
    """What gRPC gives for one call of Generate."""

    def __next__(self) -> generation_pb2.GenerateResponse: ...

    def cancel(self) -> bool: ...


Open = Callable[[generation_pb2.GenerateRequest, float | None], Call]


class GenerationStream(Iterator[Piece]):
    """Iterates over the pieces of one generation; where the connection breaks, it resumes.

    open_call starts a call with a time limit in seconds, or None. Close it, or leave its `with` block, to
    end the generation early; close() may come from another thread.
    """

    def __init__(
        self,
        open_call: Open,
        request: generation_pb2.GenerateRequest,
        *,
        retry: RetryPolicy,
        timeout_s: float | None,
    ) -> None:
        self._open_call = open_call
        self._received = Received(request)
        self._retry = retry
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._num_failures = 0
        self._closed = threading.Event()
        self._call = open_call(request, timeout_s)

    @property
    def request_id(self) -> str:
        """The service's name for this request; what the caller chose, or empty, before the first piece."""
        return self._received.request_id

    @property
    def seed(self) -> int | None:
        """What the noise is drawn from; None before the first piece if the service draws it."""
        return self._received.seed

    @property
    def weights_version(self) -> int | None:
        """The version of the weights that answers; None before the first piece."""
        return self._received.weights_version

    def __next__(self) -> Piece:
        """Raises ArrieroError when the service refuses, gives up, or stays away for too long."""
        while not self._closed.is_set():
            try:
                response = next(self._call)
            except StopIteration:
                self._recover(ArrieroError("UNAVAILABLE", "the stream ended before its choices did"), can_resume=True)
                continue
            except grpc.RpcError as error:
                self._recover(error_of(error), can_resume=self._can_resume(error))
                continue
            piece = piece_of(response)
            if self._received.accept(response, piece):
                self._num_failures = 0
                return piece
        raise StopIteration

    def close(self) -> None:
        """Ends the generation, here and in the service."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _can_resume(self, error: grpc.RpcError) -> bool:
        code = _code(error)
        # A full queue refuses a new request; one under way has been admitted before and keeps knocking.
        return code in BROKEN or (code == grpc.StatusCode.RESOURCE_EXHAUSTED and self._received.has_begun)

    def _recover(self, error: ArrieroError, *, can_resume: bool) -> None:
        """After the call ended: asks for the rest, marks the stream as closed if there is none, or raises."""
        if self._received.is_complete:
            self._closed.set()
        if self._closed.is_set():
            return
        self._num_failures += 1
        if not can_resume or self._num_failures >= self._retry.max_tries:
            raise error
        self._wait(error)
        self._call = self._open_call(self._received.remaining(), self._time_left_s())
        if self._closed.is_set():  # close() may have come before there was this call to cancel
            self._call.cancel()

    def _wait(self, error: ArrieroError) -> None:
        # Half of it at random, so that the clients of a lost gateway do not all come back at once.
        wait_s = self._retry.backoff_s(self._num_failures) * random.uniform(0.5, 1.0)
        left_s = self._time_left_s()
        if left_s is not None and left_s <= wait_s:
            raise ArrieroError("DEADLINE_EXCEEDED", f"no time left to try again after {error}") from error
        self._closed.wait(wait_s)

    def _time_left_s(self) -> float | None:
        return None if self._deadline is None else self._deadline - time.monotonic()


def error_of(error: grpc.RpcError) -> ArrieroError:
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return ArrieroError(_code(error).name, details or "")


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    return error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
