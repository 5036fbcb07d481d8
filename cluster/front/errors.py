"""The one way a request fails: a code a client can act on, and a sentence it may read."""

from __future__ import annotations

from enum import StrEnum


class StatusCode(StrEnum):
    """gRPC's names, for those that the service itself gives."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_FOUND = "NOT_FOUND"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


class ServiceError(Exception):
    """Ends a request. The message reaches the client: it must not hold anything of the inside."""

    def __init__(self, code: StatusCode, message: str) -> None:
        # Both, so that the error survives the way between processes.
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message
