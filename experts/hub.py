"""From what the user calls a model to a folder on this machine. Does not load torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from experts.checkpoint_error import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Published repositories also hold the weights in their maker's own format; we read only these files.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
HUB_IGNORED = ["original/*"]


def resolve_model(model: str) -> Path:
    """A local folder as it is; otherwise the local snapshot of a hub id, downloaded if need be.

    The hub is the one HF_ENDPOINT names; its token, cache and offline variables hold as well. A snapshot that
    is already complete is used when the hub cannot be reached. Raises CheckpointError naming the model.
    """
    folder = Path(os.path.expanduser(model))
    # The empty name would be the current folder.
    if model and folder.is_dir():
        return folder
    if HUB_ID.fullmatch(model) is None:
        raise CheckpointError(f"model {model}: no such folder")
    if folder.exists():
        raise CheckpointError(f"model {model}: wanted a folder, found a file")
    return _download(model)


def _download(model: str) -> Path:
    # Importing it takes a second and reads the environment; a local folder needs neither.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except Exception as error:
        # The client lets errors of its HTTP library through, and which library that is changes by version.
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"model {model}: no such folder, and the hub did not give it: {type(error).__name__}: {reason}"
        ) from error
