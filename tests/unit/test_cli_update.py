"""`arriero update`: how it waits, what it tells, and with what it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from admin_server import next_answer, serving

from cluster import cli
from cluster.commands import update
from cluster.commands.status import TOKEN_ENV
from cluster.v1 import admin_pb2, admin_pb2_grpc

NAME = "update-1"
ROOM = admin_pb2.MemoryRoom(memory="n1", members=["shard-0", "router-1"], needed_bytes=9, free_bytes=8, missing_bytes=2)


def progress(state: str, **fields: Any) -> admin_pb2.GetUpdateResponse:
    return admin_pb2.GetUpdateResponse(update_id=NAME, state=state, weights_version=2, model="/new", **fields)


class Service(admin_pb2_grpc.AdminServiceServicer):
    """Answers to each GetUpdate with the next of a list; the last stays."""

    def __init__(self) -> None:
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.answers: list[admin_pb2.GetUpdateResponse | grpc.StatusCode] = []
        self.asked_for: list[str] = []

    def UpdateWeights(self, request: admin_pb2.UpdateWeightsRequest, context: Any) -> admin_pb2.UpdateWeightsResponse:
        self.asked_for.append(request.model)
        if request.dry_run:
            return admin_pb2.UpdateWeightsResponse(refusal=self.refusal[1] if self.refusal else "", rooms=[ROOM])
        if self.refusal is not None:
            context.abort(*self.refusal)
        return admin_pb2.UpdateWeightsResponse(update_id=NAME, weights_version=2, rooms=[ROOM])

    def GetUpdate(self, request: admin_pb2.GetUpdateRequest, context: Any) -> admin_pb2.GetUpdateResponse:
        assert request.update_id == NAME
        return next_answer(self.answers, context)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(TOKEN_ENV, "token")
    monkeypatch.setattr(update, "POLL_S", 0.01)
    with serving(service) as address:
        yield address


def run(address: str, *flags: str, model: str = "/new") -> int:
    return cli.main(["update", "--model", model, "--address", address, *flags])


@pytest.mark.parametrize(
    ("answers", "code", "told"),
    [
        (
            [
                progress("loading"),
                grpc.StatusCode.UNAVAILABLE,
                progress("draining", waits_for=["g1"]),
                progress("done"),
            ],
            0,
            ["loading", "draining, waits for g1", "done"],
        ),
        ([progress("withdrawing"), progress("given_up", reason="no room")], 1, ["withdrawing", "given_up: no room"]),
    ],
)
def test_each_state_is_told_until_the_update_ends(
    service: Service,
    address: str,
    capsys: pytest.CaptureFixture[str],
    answers: list[Any],
    code: int,
    told: list[str],
) -> None:
    service.answers = answers
    assert run(address) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"arriero update: {NAME} to weights version 2, /new: {state}" for state in told]


def test_an_update_that_takes_longer_goes_on(
    service: Service, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answers = [progress("draining")]
    assert run(address, "--timeout-s", "0.1") == 1
    assert "not done within 0.1 s" in capsys.readouterr().err
    assert run(address, "--timeout-s", "0") == 0


def test_a_dry_run_shows_what_memory_it_would_take(
    service: Service, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(address, "--dry-run", "--json") == 0
    [room] = json.loads(capsys.readouterr().out)["rooms"]
    assert room == {
        "memory": "n1", "members": ["shard-0", "router-1"], "needed_bytes": 9, "free_bytes": 8, "missing_bytes": 2,
    }  # fmt: skip
    service.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "2 bytes are missing on n1")
    assert run(address, "--dry-run") == 2
    assert "refused: 2 bytes are missing on n1" in capsys.readouterr().out


@pytest.mark.parametrize("code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT])
def test_a_refusal_is_told(
    service: Service, address: str, capsys: pytest.CaptureFixture[str], code: grpc.StatusCode
) -> None:
    service.refusal = (code, "hidden_size is 128")
    assert run(address) == 2
    assert "hidden_size is 128" in capsys.readouterr().err


def test_a_folder_is_sent_by_its_whole_path_and_a_hub_id_as_it_is(
    service: Service, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in ("m", "meta-llama/Llama-4-Scout"):
        assert run(address, "--dry-run", model=model) == 0
    assert service.asked_for == [str(tmp_path / "m"), "meta-llama/Llama-4-Scout"]
