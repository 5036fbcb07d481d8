"""llama.cpp as a contestant, through the low-level interface of llama-cpp-python: one batch call per step."""

from __future__ import annotations

import ctypes

import llama_cpp

from cluster.bench.peers.line_protocol import Setup, serve


class LlamaCppPeer:
    """Options: ``gguf``, the model in llama.cpp's own format."""

    def __init__(self, setup: Setup) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            setup.options["gguf"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {setup.options['gguf']}")
        self._context = self._make_context(setup)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(max(setup.max_tokens, setup.max_sequences * 64), 0, 1)
        self._capacity = max(setup.max_tokens, setup.max_sequences * 64)
        self._next_ids: list[int] = []
        self._position = 0
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def begin(self, prompts: list[list[int]]) -> None:
        """The prompts are equally long."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._position = 0
        self._decode(prompts)

    def decode_step(self) -> None:
        self._decode([[token_id] for token_id in self._next_ids])

    def prefill(self, prompt: list[int]) -> None:
        self.begin([prompt])

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _make_context(self, setup: Setup) -> object:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = setup.max_tokens * setup.max_sequences
        params.n_seq_max = setup.max_sequences
        params.n_batch = params.n_ubatch = max(setup.max_tokens, setup.max_sequences * 64)
        params.n_ubatch = min(512, params.n_batch)
        params.n_threads = params.n_threads_batch = setup.num_threads
        params.kv_unified = False
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError("llama.cpp cannot make a context of that size")
        return context

    def _decode(self, token_ids_of_sequence: list[list[int]]) -> None:
        """The next tokens of every sequence; samples each one's successor from the logits of its last."""
        last_rows = []
        row = 0
        for sequence, token_ids in enumerate(token_ids_of_sequence):
            for offset, token_id in enumerate(token_ids):
                self._batch.token[row] = token_id
                self._batch.pos[row] = self._position + offset
                self._batch.n_seq_id[row] = 1
                self._batch.seq_id[row][0] = sequence
                self._batch.logits[row] = offset == len(token_ids) - 1
                row += 1
            last_rows.append(row - 1)
        assert row <= self._capacity, f"{row} tokens at once, the batch has room for {self._capacity}"
        self._batch.n_tokens = row
        if code := llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode failed with code {code}")
        self._position += len(token_ids_of_sequence[0])
        self._next_ids = [self._argmax(last_row) for last_row in last_rows]

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        numbers = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
        import numpy as np

        return int(np.frombuffer(numbers, dtype=np.float32).argmax())


if __name__ == "__main__":
    serve(LlamaCppPeer)
