"""`arriero chat` as a process of its own, against a real gRPC server, from a pipe and in a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from scripted_service import Script, made_up_token, start

from cluster.v1 import generation_pb2

TIME_LIMIT_S = 60.0
SEED = 3
NUM_TOKENS = 4
ANSWER = "".join(f"{made_up_token(SEED, 0, position)} " for position in range(NUM_TOKENS))


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    server, port = start(script)
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


def command(address: str, *arguments: str) -> list[str]:
    common = ["--address", address, "--seed", str(SEED), "--max-tokens", str(NUM_TOKENS)]
    return [sys.executable, "-m", "cluster.cli", "chat", *common, *arguments]


def chat(address: str, typed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(address, *arguments), input=typed, capture_output=True, text=True, timeout=TIME_LIMIT_S
    )


def spoken(request: generation_pb2.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, "".join(part.text for part in message.content)) for message in request.chat.messages]


def test_answers_go_to_stdout_and_into_the_next_request(script: Script, address: str) -> None:
    result = chat(address, "first\n\nsecond\n", "--system", "be brief")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{ANSWER}\n{ANSWER}\n"
    assert result.stderr.count(f"{NUM_TOKENS} tokens") == 2
    assert spoken(script.requests[1]) == [
        ("system", "be brief"),
        ("user", "first"),
        ("assistant", ANSWER),
        ("user", "second"),
    ]


def test_reset_forgets_and_exit_leaves(script: Script, address: str) -> None:
    result = chat(address, "first\n/reset\nsecond\n/exit\nnever asked\n")
    assert result.returncode == 0, result.stderr
    assert [spoken(request) for request in script.requests] == [[("user", "first")], [("user", "second")]]


def test_an_unknown_command_is_not_sent(script: Script, address: str) -> None:
    result = chat(address, "/frobnicate now\n")
    assert "/frobnicate is no command" in result.stderr
    assert not script.requests


def test_a_refused_question_is_told_and_not_kept(script: Script, address: str) -> None:
    script.fail = [lambda context: context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt is too \x1b[31mlong")]
    script.fail_after = [-1]
    result = chat(address, "refused\nasked anew\n")
    assert "INVALID_ARGUMENT: prompt is too" in result.stderr
    assert "\x1b[31m" not in result.stderr
    assert result.returncode == 0
    assert spoken(script.requests[1]) == [("user", "asked anew")]


def test_a_pipe_whose_last_question_failed_says_so_with_its_exit_code(script: Script, address: str) -> None:
    script.fail = [lambda context: context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")]
    script.fail_after = [-1]
    assert chat(address, "refused\n").returncode == 1


def test_a_machine_without_a_service_is_told_in_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "chat"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )
    assert result.returncode == 2
    assert "no record of a service" in result.stderr
    assert result.stderr.count("\n") == 1


class Terminal:
    """A pseudo-terminal with the chat in it."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.execve(arguments[0], arguments, {**os.environ, "TERM": "dumb", "NO_COLOR": "1"})
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def expect(self, text: str) -> None:
        """Reads on until text has been seen; what came before it is forgotten."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while text not in self.seen:
            readable, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"{text!r} did not come, only {self.seen!r}"
            self.seen += os.read(self._descriptor, 4096).decode()
        self.seen = self.seen.partition(text)[2]

    def interrupt_prompt(self) -> None:
        """Ctrl-C until a new prompt: the next key brings one that came between readline's prompt and its wait."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while not self._comes_soon("you> "):
            assert time.monotonic() < deadline, "Ctrl-C brought no new prompt"
            self.type("\x03")
        while self._comes_soon("you> "):
            pass

    def _comes_soon(self, text: str) -> bool:
        while text not in self.seen:
            if not select.select([self._descriptor], [], [], 0.5)[0]:
                return False
            self.seen += os.read(self._descriptor, 4096).decode()
        self.seen = self.seen.partition(text)[2]
        return True

    def exit_code(self) -> int:
        """Waits for the end; what is still written is read away, else the end would not come."""
        while True:
            try:
                if not os.read(self._descriptor, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self._descriptor)


@contextmanager
def in_terminal(arguments: list[str]) -> Iterator[Terminal]:
    terminal = Terminal(arguments)
    try:
        yield terminal
    finally:
        terminal.close()


def test_ctrl_c_ends_the_answer_and_not_the_chat(script: Script, address: str) -> None:
    gone = threading.Event()

    def stall(context: grpc.ServicerContext) -> None:
        if not context.add_callback(gone.set):
            gone.set()  # the client was quicker
        assert gone.wait(TIME_LIMIT_S), "the client never went"

    script.fail, script.fail_after = [stall], [2]
    begun = f"{made_up_token(SEED, 0, 0)} {made_up_token(SEED, 0, 1)} "
    with in_terminal(command(address)) as terminal:
        terminal.expect("you> ")
        terminal.interrupt_prompt()
        terminal.type("first\n")
        terminal.expect(begun)
        terminal.type("\x03")
        terminal.expect("interrupted")
        assert gone.wait(TIME_LIMIT_S)
        terminal.expect("you> ")
        terminal.type("second\n")
        terminal.expect(ANSWER)
        terminal.expect("you> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    assert spoken(script.requests[1]) == [("user", "first"), ("assistant", begun), ("user", "second")]
