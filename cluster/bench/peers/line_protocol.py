"""How a benchmark talks to the process of a contestant: one JSON object per line, in on stdin and out on stdout.

The first line is the Setup, every later one a question:

    {"do": "begin", "prompts": [[..], ..]}    computes the prompts; from then on every sequence decodes
    {"do": "decode", "steps": n}              that many steps, each one token for every sequence
    {"do": "prefill", "prompt": [..]}         one prompt alone, up to its first token

Each is answered by a line with "seconds", one per step, and "cpu_seconds", the process's own, or by one with "error".
The process ends with its stdin. Standard library only: a peer may live in a virtual environment without arriero.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """dtype: torch's name. max_tokens: of a sequence, prompt included. options: what one contestant alone knows."""

    model: str
    dtype: str
    num_threads: int
    max_sequences: int
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)


class Peer(Protocol):
    """One model, loaded. Sampling is greedy and no token ends a sequence."""

    version: str

    def begin(self, prompts: list[list[int]]) -> None:
        """Forgets earlier sequences, then computes these prompts and samples each one's first token."""

    def decode_step(self) -> None:
        """One more token for every sequence of the last ``begin``."""

    def prefill(self, prompt: list[int]) -> None:
        """Forgets earlier sequences, then computes one prompt and samples its first token."""

    def close(self) -> None: ...


def serve(make_peer: Callable[[Setup], Peer]) -> None:
    """The life of a contestant's process."""
    answers = _take_stdout()
    try:
        peer = make_peer(Setup(**json.loads(sys.stdin.readline())))
    except Exception as error:  # noqa: BLE001
        # The edge of the process: whatever a library throws at its start is told to the benchmark.
        _answer(answers, {"error": _one_line(error)})
        return
    _answer(answers, {"version": peer.version})
    try:
        for line in sys.stdin:
            _answer(answers, _reply(peer, json.loads(line)))
    finally:
        peer.close()


def _take_stdout() -> TextIO:
    """Libraries print what they like; from now on that goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _reply(peer: Peer, question: dict[str, Any]) -> dict[str, Any]:
    try:
        match question["do"]:
            case "begin":
                return _timed(lambda: peer.begin(question["prompts"]))
            case "decode":
                return _timed(peer.decode_step, question["steps"])
            case "prefill":
                return _timed(lambda: peer.prefill(question["prompt"]))
            case other:
                return {"error": f"unknown question {other!r}"}
    except Exception as error:  # noqa: BLE001
        return {"error": _one_line(error)}


def _timed(action: Callable[[], None], times: int = 1) -> dict[str, Any]:
    seconds, cpu_seconds = [], []
    for _ in range(times):
        started_at, cpu_at = time.perf_counter(), time.process_time()
        action()
        seconds.append(time.perf_counter() - started_at)
        cpu_seconds.append(time.process_time() - cpu_at)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
