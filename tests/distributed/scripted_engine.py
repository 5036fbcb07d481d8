"""An engine process with an engine that counts: `python -m scripted_engine FD PARENT_PID` under router.process.

A request's tokens count up from its first prompt token. The first prompt token also scripts what happens.
"""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection

from router.engine_loop import BuiltEngine
from router.messages import EngineStats, FinishReason, GenerateRequest, SequenceOutput, Start
from router.process import enter, serve

FAILING_STEP = 666
HANGING_STEP = 777
REFUSED = 888
# Has no token for as long as anybody waits: a prompt that takes long.
SILENT = 999
NUM_BLOCKS = 64
STEP_S = 0.001
# Models that say something else than messages: no MessagePack, and none of our kinds.
BABBLE = {"babbling": b"\xc1", "foreign": b"\x81\xa4type\xa5alien"}


class CountingEngine:
    """One block per open request."""

    def __init__(self) -> None:
        self._open: dict[str, GenerateRequest] = {}
        self._num_sent: dict[str, int] = {}
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def add(self, request: GenerateRequest) -> None:
        if request.prompt_ids[0] == REFUSED:
            raise ValueError(f"prompt_ids[0] must not be {REFUSED}")
        self._open[request.request_id] = request
        self._num_sent[request.request_id] = 0

    def abort(self, request_id: str) -> None:
        del self._open[request_id]

    def step(self) -> list[SequenceOutput]:
        self._num_steps += 1
        time.sleep(STEP_S)
        return [self._advance(request) for request in tuple(self._open.values()) if request.prompt_ids[0] != SILENT]

    def resume_parked(self) -> None:
        """Nothing waits here."""

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._open),
            num_waiting=0,
            num_waiting_tokens=0,
            num_free_blocks={"global": NUM_BLOCKS - len(self._open)},
            num_blocks={"global": NUM_BLOCKS},
            num_steps=self._num_steps,
            num_preemptions=0,
            num_prompt_tokens=0,
            num_generated_tokens=0,
            num_cached_tokens=0,
            num_degraded_tokens=0,
            lost_shards={},
            expert_load=[],
        )

    def _advance(self, request: GenerateRequest) -> SequenceOutput:
        first = request.prompt_ids[0]
        if first == FAILING_STEP:
            raise RuntimeError("the scripted step failed")
        if first == HANGING_STEP:
            time.sleep(3600)
        num_sent = self._num_sent[request.request_id] = self._num_sent[request.request_id] + 1
        finished = num_sent == request.params.max_tokens
        if finished:
            del self._open[request.request_id]
        return SequenceOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            token_ids=[first + num_sent],
            finish_reason=FinishReason.LENGTH if finished else None,
        )


def build(start: Start) -> BuiltEngine:
    if start.settings.model == "unbuildable":
        raise ValueError("model 'unbuildable' cannot be built")
    if (babble := BABBLE.get(start.settings.model)) is not None:
        Connection(os.dup(int(sys.argv[1]))).send_bytes(babble)
    return BuiltEngine(engine=CountingEngine(), capacity="enough", close=lambda: None)


if __name__ == "__main__":
    sys.exit(serve(enter(fd=int(sys.argv[1]), parent_pid=int(sys.argv[2])), build))
