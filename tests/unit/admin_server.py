"""A gRPC server of a test's own AdminService, for the commands that talk to one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from cluster.v1 import admin_pb2_grpc

Answer = TypeVar("Answer")


@contextmanager
def serving(service: admin_pb2_grpc.AdminServiceServicer) -> Iterator[str]:
    """Its address."""
    server = grpc.server(ThreadPoolExecutor(2))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(10)


def next_answer(answers: list[Answer | grpc.StatusCode], context: Any) -> Answer:
    """The first of the list, which goes; the last one stays."""
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    if isinstance(answer, grpc.StatusCode):
        context.abort(answer, "says the service")
        raise AssertionError
    return answer
