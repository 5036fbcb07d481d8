"""Arriero's engine as a contestant, without Ray. Experts live in this process or, with an epoch, in shards."""

from __future__ import annotations

from itertools import count

import torch

from cluster.bench.peers.line_protocol import Setup, serve
from router.engine_builder import build_engine
from router.engine_loop import BuiltEngine
from router.messages import EngineSettings, GenerateRequest, SequenceOutput, Start
from router.sampling_params import SamplingParams

WEIGHTS_VERSION = 0


class ArrieroPeer:
    def __init__(self, setup: Setup) -> None:
        self._built = _build(setup)
        self._max_tokens = setup.max_tokens
        self._numbers = count()
        self._open: set[str] = set()
        self.version = f"torch {torch.__version__}"

    def begin(self, prompts: list[list[int]]) -> None:
        self._forget()
        for prompt in prompts:
            self._add(prompt, max_tokens=self._max_tokens - len(prompt))
        while sum(len(output.token_ids) for output in self._step()) < len(prompts):
            # A long prompt takes several steps; those that are done meanwhile just decode.
            continue

    def decode_step(self) -> None:
        outputs = self._step()
        assert len(outputs) == len(self._open), f"{len(outputs)} of {len(self._open)} sequences got a token"

    def prefill(self, prompt: list[int]) -> None:
        self._forget()
        self._add(prompt, max_tokens=1)
        while not self._step():
            continue

    def close(self) -> None:
        self._built.close()

    def _add(self, prompt: list[int], *, max_tokens: int) -> None:
        request_id = str(next(self._numbers))
        # A salt of its own: no prompt is found in the prefix cache.
        request = GenerateRequest(
            request_id=request_id,
            prompt_ids=prompt,
            params=SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=0, ignore_eos=True),
            cache_salt=request_id,
        )
        self._built.engine.add(request)
        self._open.add(request_id)

    def _step(self) -> list[SequenceOutput]:
        outputs = self._built.engine.step()
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        return outputs

    def _forget(self) -> None:
        for request_id in self._open:
            self._built.engine.abort(request_id)
        self._open.clear()


def _build(setup: Setup) -> BuiltEngine:
    """Options: ``epoch`` (Epoch.to_dict), ``secret`` (hex), ``router_id``, ``lane_transport``, ``micro_batches``,
    ``expert_dtype``;
    without an epoch the experts are here."""
    settings = EngineSettings(
        model=setup.model,
        dtype="bfloat16" if setup.dtype == "bfloat16" else "float32",
        num_threads=setup.num_threads,
        max_model_len=setup.max_tokens,
        max_num_seqs=setup.max_sequences,
        lane_transport=setup.options.get("lane_transport", "auto"),
        expert_dtype=setup.options.get("expert_dtype", "auto"),
        micro_batches=setup.options.get("micro_batches", "auto"),
    )
    start = Start(
        router_id=setup.options.get("router_id", "bench"),
        settings=settings,
        secret=bytes.fromhex(setup.options.get("secret", "")),
        weights_version=WEIGHTS_VERSION,
        epoch=setup.options.get("epoch"),
    )
    return build_engine(start)


if __name__ == "__main__":
    serve(ArrieroPeer)
