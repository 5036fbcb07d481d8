"""Experts that stand in for real ones where something else is measured: lanes alone, or shards that take as long as
one likes. What they answer is no model's output.
"""

from __future__ import annotations

import time

import torch


class EchoExpert:
    """Answers rows with themselves, after service_s and for each row row_s seconds of sleep: simulated, and nothing
    is computed."""

    num_bytes = 0

    def __init__(self, service_s: float = 0.0, row_s: float = 0.0) -> None:
        self._service_s = service_s
        self._row_s = row_s

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        if (seconds := self._service_s + self._row_s * len(x_RD)) > 0:
            time.sleep(seconds)
        return x_RD
