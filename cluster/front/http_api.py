"""The HTTP side of a gateway. Serve builds it within each gateway replica."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fastapi import FastAPI, Response
from ray import serve

from cluster.front.http_metrics import add_metrics_route

if TYPE_CHECKING:
    from cluster.front.gateway import Gateway


def build_http_api() -> FastAPI:
    """Routes find their gateway at call time, since Serve offers no other way to it."""
    api = FastAPI(title="Arriero", docs_url=None, redoc_url=None, openapi_url=None)

    @api.get("/health")
    async def health() -> Response:
        """200 while requests can be served, else 503."""
        return Response(status_code=200 if await _gateway().is_serving() else 503)

    add_metrics_route(api, _gateway)
    return api


def _gateway() -> Gateway:
    return cast("Gateway", serve.get_replica_context().servable_object)
