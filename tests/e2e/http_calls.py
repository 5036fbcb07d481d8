"""HTTP as it is on the wire, and the `openai` client, for a running service."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from conftest import Service
from openai import AsyncOpenAI, OpenAI

TIMEOUT_S = 120.0
MODEL = "tiny-maverick"
# No retries: a test wants to see what the service says.
OPTIONS: Mapping[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": TIMEOUT_S}


def openai_client(service: Service) -> OpenAI:
    return OpenAI(base_url=f"{base_url(service)}/v1", **OPTIONS)


def async_openai_client(service: Service) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{base_url(service)}/v1", **OPTIONS)


def base_url(service: Service) -> str:
    return f"http://{service.cluster.http_address}/{service.app_name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def send(
    service: Service,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One request. A body of several parts goes out in chunks, its length untold."""
    connection = http.client.HTTPConnection(service.cluster.http_address, timeout=TIMEOUT_S)
    try:
        is_chunked = body is not None and not isinstance(body, bytes)
        connection.request(method, f"/{service.app_name}{path}", body, dict(headers or {}), encode_chunked=is_chunked)
        response = connection.getresponse()
        lowered = {name.lower(): value for name, value in response.getheaders()}
        return Response(status=response.status, headers=lowered, body=response.read())
    finally:
        connection.close()
