"""`arriero rebalance` without --dry-run: how it waits, and with what it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from admin_server import next_answer, serving

from cluster import cli
from cluster.commands import rebalance
from cluster.commands.status import TOKEN_ENV
from cluster.v1 import admin_pb2, admin_pb2_grpc

NAME = "rebalance-1"


def progress(state: str, **fields: Any) -> admin_pb2.GetRebalanceResponse:
    return admin_pb2.GetRebalanceResponse(rebalance_id=NAME, state=state, num_stages=2, **fields)


class Service(admin_pb2_grpc.AdminServiceServicer):
    """Answers to Rebalance with a plan or refusal, and to each GetRebalance with the next of a list; the last stays."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        self.answers: list[admin_pb2.GetRebalanceResponse | grpc.StatusCode] = []
        self.num_asked = 0

    def Rebalance(self, request: admin_pb2.RebalanceRequest, context: Any) -> admin_pb2.RebalanceResponse:
        if self.refusal is not None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        return admin_pb2.RebalanceResponse(rebalance_id=NAME, stages=[admin_pb2.RebalanceStage()] * 2)

    def GetRebalance(self, request: admin_pb2.GetRebalanceRequest, context: Any) -> admin_pb2.GetRebalanceResponse:
        assert request.rebalance_id == NAME
        self.num_asked += 1
        return next_answer(self.answers, context)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(TOKEN_ENV, "token")
    monkeypatch.setattr(rebalance, "POLL_S", 0.01)
    with serving(service) as address:
        yield address


@pytest.mark.parametrize(
    ("answers", "code", "told"),
    [
        ([progress("moving"), progress("done", num_stages_done=2, epoch=5)], 0, "done; epoch 5 is in force"),
        (
            [grpc.StatusCode.UNAVAILABLE, progress("given_up", num_stages_done=1, reason="shard-1 died")],
            1,
            "given up after 1 of 2 stages: shard-1 died",
        ),
        ([progress("moving"), grpc.StatusCode.NOT_FOUND], 1, "the controller that had begun it has gone"),
        ([grpc.StatusCode.UNAUTHENTICATED], 1, "UNAUTHENTICATED: says the service"),
    ],
    ids=["done", "given up", "another controller", "an error"],
)
def test_it_waits_until_all_is_moved_or_given_up(
    service: Service, address: str, capsys: pytest.CaptureFixture[str], answers: list[Any], code: int, told: str
) -> None:
    service.answers = answers
    assert cli.main(["rebalance", "--address", address]) == code
    printed = capsys.readouterr()
    assert "to load in 2 stages" in printed.out
    assert told in printed.err


def test_a_refusal_has_an_exit_code_of_its_own(
    service: Service, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.refusal = "even: the load is even"
    assert cli.main(["rebalance", "--address", address]) == 2
    assert "FAILED_PRECONDITION: even: the load is even" in capsys.readouterr().err
    assert service.num_asked == 0


def test_it_does_not_wait_for_longer_than_it_is_told(
    service: Service, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answers = [progress("moving")]
    assert cli.main(["rebalance", "--address", address, "--timeout-s", "0.2"]) == 1
    assert "not done within 0.2 s; it goes on" in capsys.readouterr().err
    asked = service.num_asked
    assert asked > 0
    assert cli.main(["rebalance", "--address", address, "--timeout-s", "0"]) == 0
    assert service.num_asked == asked
