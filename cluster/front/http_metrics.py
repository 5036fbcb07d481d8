"""``GET /metrics``: the whole service, whichever gateway is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastapi import FastAPI, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from cluster.front.errors import ServiceError


class MetricsSource(Protocol):
    async def metrics(self) -> bytes:
        """In Prometheus's text format. Raises ServiceError when they cannot be had."""
        ...


def add_metrics_route(api: FastAPI, source: Callable[[], MetricsSource]) -> None:
    @api.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        try:
            return Response(await source().metrics(), media_type=CONTENT_TYPE_LATEST)
        except ServiceError as error:
            return Response(f"{error.message}\n", status_code=503, media_type="text/plain")
