"""Whether one model can take another's place under open traffic: nothing may differ but its weights. Reads files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.service_model import read_model_config

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_SHOWN = 60


def differences(served: Path, wanted: Path) -> list[str]:
    """A sentence for each difference, none where the update may go on. Raises OSError or ValueError for a folder that
    is no checkpoint."""
    return [*_of_model(served, wanted), *_of_tokenizer(served, wanted)]


def _of_model(served: Path, wanted: Path) -> Iterator[str]:
    old, new = asdict(read_model_config(served)), asdict(read_model_config(wanted))
    for field, value in old.items():
        if new[field] != value:
            yield f"{field} is {_shown(new[field])}, the service has {_shown(value)}"


def _of_tokenizer(served: Path, wanted: Path) -> Iterator[str]:
    """Gateways keep theirs: requests of both versions go through it."""
    if _content(served / TOKENIZER) != _content(wanted / TOKENIZER):
        yield f"{TOKENIZER} is not the service's"
    old, new = _special_tokens(served), _special_tokens(wanted)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name} in {TOKENIZER_CONFIG} is {_shown(new.get(name))}, the service has {_shown(old.get(name))}"


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _special_tokens(folder: Path) -> dict[str, Any]:
    content = _content(folder / TOKENIZER_CONFIG)
    if content is None:
        return {}
    entries = json.loads(content)
    if not isinstance(entries, dict):
        raise ValueError(f"{folder / TOKENIZER_CONFIG} must hold a JSON object")
    return {name: entry for name, entry in entries.items() if name.endswith("_token")}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
