"""transformers as a contestant: the loop of ``generate`` with its own KV cache, without what generate does beside."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from cluster.bench.peers.line_protocol import Setup, serve


class TransformersPeer:
    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.num_threads)
        dtype = getattr(torch, setup.dtype)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype)
        self._cache: transformers.DynamicCache | None = None
        self._token_ids_B1 = torch.empty(0, 1, dtype=torch.int64)
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def begin(self, prompts: list[list[int]]) -> None:
        """The prompts are equally long: nothing is padded."""
        self._cache = transformers.DynamicCache(config=self._model.config)
        self._forward(torch.tensor(prompts))

    def decode_step(self) -> None:
        self._forward(self._token_ids_B1)

    def prefill(self, prompt: list[int]) -> None:
        self.begin([prompt])

    def close(self) -> None:
        self._cache = None

    @torch.inference_mode()
    def _forward(self, token_ids_BT: torch.Tensor) -> None:
        output = self._model(input_ids=token_ids_BT, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token_ids_B1 = output.logits[:, -1].argmax(dim=-1, keepdim=True)


if __name__ == "__main__":
    serve(TransformersPeer)
