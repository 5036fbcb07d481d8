"""A random checkpoint in llama.cpp's own format, so that `arriero bench engine --gguf FILE` can run it.

    python tests/bench/convert_gguf.py LLAMA_CPP CHECKPOINT OUT.gguf

LLAMA_CPP is llama.cpp's source tree (vendor/llama.cpp of the llama-cpp-python sdist); its converter does the work. The
tokenizer is left out: a benchmark feeds token ids, and the converter knows published tokenizers only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main() -> None:
    llama_cpp, checkpoint, out = map(Path, sys.argv[1:])
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.llama import Llama4Model

    def set_vocab(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    Llama4Model.set_vocab = set_vocab
    sys.argv = ["convert_hf_to_gguf", str(checkpoint), "--outfile", str(out), "--outtype", "bf16"]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
