"""How an HTTP request fails: a status code and OpenAI's error object."""

from __future__ import annotations

import re

import msgspec

from cluster.front.errors import ServiceError, StatusCode
from cluster.front.openai.request_fields import RequestModel

STATUS_OF_CODE = {
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.NOT_FOUND: 404,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.INTERNAL: 500,
}
CODES = {413: "request_too_large", 429: "queue_full", 500: "internal_error", 503: "unavailable"}
# What a client should wait before it tries again; the queue moves and lost routers come back within seconds.
RETRY_AFTER_S = 1
RETRIED = (429, 503)
LEADING_FIELD = re.compile(r"[a-z_]+")


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """param: the field that is to blame, where it is one. code: for programs; message: for people."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorInfo


class ApiError(Exception):
    """Ends a request. The message reaches the client: it must not hold anything of the inside."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODES.get(status)

    @property
    def service_code(self) -> StatusCode:
        """What the service's own logs and counts call it."""
        codes = {status: code for code, status in STATUS_OF_CODE.items()}
        return codes.get(self.status, StatusCode.INVALID_ARGUMENT)

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(RETRY_AFTER_S)} if self.status in RETRIED else {}

    def body(self) -> bytes:
        info = ErrorInfo(message=self.message, type=_type_of(self.status), param=self.param, code=self.code)
        return msgspec.json.encode(ErrorBody(error=info))


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def of_service_error(error: ServiceError, request: RequestModel) -> ApiError:
    """What ended the request inside the service."""
    if error.code is StatusCode.INVALID_ARGUMENT:
        return argument_error(error.message, request)
    return ApiError(STATUS_OF_CODE[error.code], error.message)


def argument_error(message: str, request: RequestModel) -> ApiError:
    """message: about a field, whose name it begins with. The core's names become the request's."""
    named = LEADING_FIELD.match(message)
    if named is None:
        return ApiError(400, message, code="invalid_value")
    field = request.core_names.get(named.group(), named.group())
    message = field + message[named.end() :]
    param = field if field in type(request).model_fields else None
    return ApiError(400, message, param=param, code="invalid_value")
