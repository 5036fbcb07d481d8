"""Where the model lies that comes with Arriero."""

from __future__ import annotations

from pathlib import Path


def demo_checkpoint() -> Path:
    """The folder of the small trained model that is served by default; its README.md says what it can do."""
    return Path(__file__).parent / "demo"
