"""The one error of everything that reads checkpoints; apart from them so that it can be caught without torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file or tensor, what was wanted and what was found."""
