"""The HTTP side of a gateway: routes to operations, nothing else. Serve builds it within each gateway replica."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

from fastapi import FastAPI, Request, Response
from ray import serve
from ray.exceptions import RayError
from starlette.exceptions import HTTPException
from starlette.routing import Route

from cluster.front.http_metrics import add_metrics_route
from cluster.front.openai.api_error import ApiError
from cluster.front.openai.attendance import attend
from cluster.front.openai.exchange import JSON, Exchange, Message, Receive, Scope, Send
from cluster.front.openai.openapi import openapi_document
from cluster.front.openai.operations import OPERATIONS, Operation

if TYPE_CHECKING:
    from cluster.front.gateway import Gateway


def build_http_api() -> FastAPI:
    """Routes find their gateway at call time, since Serve offers no other way to it."""
    api = FastAPI(title="Arriero", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for operation in OPERATIONS:
        api.router.routes.append(Route(operation.path, ServedOperation(operation), methods=[operation.method]))

    @api.get("/health")
    async def health() -> Response:
        """200 while requests can be served, else 503."""
        return Response(status_code=200 if await _gateway().is_serving() else 503)

    @api.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        document = openapi_document(service_version=version("arriero"), root_path=request.scope.get("root_path", ""))
        return Response(json.dumps(document), media_type=JSON)

    add_metrics_route(api, _gateway)
    api.add_exception_handler(HTTPException, _no_such_route)  # type: ignore[arg-type]
    return api


class ServedOperation:
    """An operation as an ASGI application. Not a function: FastAPI would read bodies whole, and let clients go."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        api = _gateway().openai

        async def handle(exchange: Exchange, body: bytes) -> None:
            await self._operation.handler(api, exchange, body)

        async def receive_or_end() -> Message:
            try:
                return await receive()
            except RayError:
                # Serve's proxy has gone, or our call to it was cancelled along with this one. So has the client.
                return {"type": "http.disconnect"}

        max_body_bytes = None if self._operation.request is None else api.max_request_bytes
        await attend(Exchange(scope, receive_or_end, send), handle, max_body_bytes=max_body_bytes)


async def _no_such_route(request: Request, error: HTTPException) -> Response:
    """404 and 405, before any operation."""
    path = request.url.path[:200]
    what = f"{request.method} is not possible" if error.status_code == 405 else "there is nothing"
    failure = ApiError(error.status_code, f"{what} at {path}")
    return Response(failure.body(), status_code=failure.status, media_type=JSON, headers=error.headers)


def _gateway() -> Gateway:
    return cast("Gateway", serve.get_replica_context().servable_object)
