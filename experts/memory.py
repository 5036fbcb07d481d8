"""How much memory this process may still take, where it will compute."""

from __future__ import annotations

from pathlib import Path

import torch

from experts.host_memory import CGROUP, free_host_bytes


def free_bytes(device: torch.device, *, cgroup: Path = CGROUP) -> int:
    """Of a GPU, what its driver calls free; of the host, what ``free_host_bytes`` says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes(cgroup=cgroup)
