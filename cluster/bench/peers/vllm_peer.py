"""vLLM on a CPU as a contestant: its engine stepped from here, its workers as it likes them.

How its threads are bound decides most of its speed: set VLLM_CPU_OMP_THREADS_BIND, for example "0|1" for two workers.
"""

from __future__ import annotations

import os
from itertools import count
from typing import Any

from cluster.bench.peers.line_protocol import Setup, serve

# The engine must be stepped, and timed, from this process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Of the machine's memory, for each worker: others are measured in the same run, and what vLLM asks for must be free.
MEMORY_SHARE = 0.3


class VllmPeer:
    """Options: ``processes``, over which its tensor parallelism spreads the model."""

    def __init__(self, setup: Setup) -> None:
        import vllm

        self._sampling = vllm.SamplingParams
        self._llm: Any = vllm.LLM(
            model=setup.model,
            dtype=setup.dtype,
            tensor_parallel_size=setup.options.get("processes", 1),
            max_model_len=setup.max_tokens,
            max_num_seqs=setup.max_sequences,
            max_num_batched_tokens=2048,
            gpu_memory_utilization=MEMORY_SHARE,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._engine = self._llm.llm_engine
        self._numbers = count()
        self._open: list[str] = []
        self._max_tokens = setup.max_tokens
        self.version = f"vllm {vllm.__version__}"

    def begin(self, prompts: list[list[int]]) -> None:
        self._forget()
        for prompt in prompts:
            self._add(prompt, max_tokens=self._max_tokens - len(prompt))
        while self._step() < len(prompts):
            continue

    def decode_step(self) -> None:
        self._step()

    def prefill(self, prompt: list[int]) -> None:
        self._forget()
        self._add(prompt, max_tokens=1)
        while not self._step():
            continue

    def close(self) -> None:
        self._forget()

    def _add(self, prompt: list[int], *, max_tokens: int) -> None:
        request_id = str(next(self._numbers))
        params = self._sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        self._open.append(request_id)

    def _step(self) -> int:
        """Returns how many sequences got a token."""
        return len(self._engine.step())

    def _forget(self) -> None:
        self._engine.abort_request(self._open)
        self._open.clear()
        while self._engine.has_unfinished_requests():
            self._engine.step()


if __name__ == "__main__":
    serve(VllmPeer)
