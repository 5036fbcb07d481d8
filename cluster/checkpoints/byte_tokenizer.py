"""A byte-level tokenizer with the special tokens of Llama 4, for checkpoints that have no trained vocabulary.

Token ids 0 to 255 are the bytes. The special tokens follow in the published order, so a special token's id is
its published id minus 200000 plus 256. It needs no training, any text goes through it unchanged, and it fits
the smallest vocabulary we make.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from cluster.front.byte_alphabet import NUM_BYTES, byte_characters

# Offsets in the published vocabulary, which starts its special tokens at 200000. Unnamed ones are reserved.
_NAMED_OFFSETS = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|fim_prefix|>": 2,
    "<|fim_middle|>": 3,
    "<|fim_suffix|>": 4,
    "<|header_start|>": 5,
    "<|header_end|>": 6,
    "<|eom|>": 7,
    "<|eot|>": 8,
    "<|step|>": 9,
    "<|python_start|>": 16,
    "<|python_end|>": 17,
    "<|finetune_right_pad|>": 18,
    "<|image_start|>": 80,
    "<|image_end|>": 81,
    "<|tile_x_separator|>": 84,
    "<|tile_y_separator|>": 85,
    "<|image|>": 90,
    "<|patch|>": 92,
}

SPECIAL_TOKENS = {name: NUM_BYTES + offset for name, offset in _NAMED_OFFSETS.items()}
VOCAB_SIZE = max(SPECIAL_TOKENS.values()) + 1

BOS_TOKEN_ID = SPECIAL_TOKENS["<|begin_of_text|>"]
EOS_TOKEN_IDS = (SPECIAL_TOKENS["<|end_of_text|>"], SPECIAL_TOKENS["<|eom|>"], SPECIAL_TOKENS["<|eot|>"])
PAD_TOKEN_ID = SPECIAL_TOKENS["<|finetune_right_pad|>"]


def build_tokenizer() -> Tokenizer:
    """Encodes text as its UTF-8 bytes after ``<|begin_of_text|>``, the way the published tokenizer does."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _special_names()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", BOS_TOKEN_ID)],
    )
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into an existing folder."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _special_names() -> list[str]:
    """All special tokens by id from 256 on; ids must have no gaps, so unnamed ones get reserved names."""
    name_of = {token_id: name for name, token_id in SPECIAL_TOKENS.items()}
    return [
        name_of.get(token_id, f"<|reserved_special_token_{token_id - NUM_BYTES}|>")
        for token_id in range(NUM_BYTES, VOCAB_SIZE)
    ]
