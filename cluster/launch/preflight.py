"""Everything that can be known to be wrong before a process is started, found within seconds and named.

Each check raises ValueError or OSError with one sentence that names the thing.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from cluster.config import ServiceConfig
from cluster.engine_settings import engine_settings
from cluster.front.chat_encoder import chat_encoder
from cluster.front.tokenizer import Tokenizer
from cluster.service_model import read_model_config, resolve
from router.config import ModelConfig

EVERYWHERE = ("0.0.0.0", "::")
IP_VERSION_MISSING = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def check_model(config: ServiceConfig, *, runs_here: bool = True) -> ServiceConfig:
    """Returns the configuration with absolute paths for local files. Downloads a model of the hub.

    Reads the chat template and the checkpoint's configuration, tokenizer and headers, none of the weights. runs_here:
    the routers will be on this machine, so that its memory and devices count.
    """
    # Loads torch (the checkpoint knows its dtypes); a wrong flag should be told before that.
    from experts.hub import resolve_model

    folder = resolve_model(config.model)
    model = read_model_config(folder)
    resolved = resolve(config, model, os.cpu_count() or 1)
    chat_encoder(Tokenizer(folder), config.chat_template)
    _check_tensors(folder, model)
    if runs_here:
        _check_device(config.device)
        _check_kv_cache(resolved, model)
    return config.model_copy(update=_absolute_paths(config, folder))


def _absolute_paths(config: ServiceConfig, folder: Path) -> dict[str, str]:
    """Other processes may work in other folders."""
    paths = {"model": str(folder.absolute())} if Path(config.model).is_dir() else {}
    if config.chat_template is not None:
        paths["chat_template"] = str(Path(config.chat_template).absolute())
    return paths


def _check_tensors(folder: Path, model: ModelConfig) -> None:
    from experts.checkpoint import Checkpoint
    from experts.weights import validate_experts
    from router.weights import validate_router

    checkpoint = Checkpoint.open(folder)
    validate_router(checkpoint, model)
    validate_experts(checkpoint, model.moe_layers, model.expert_shape)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device on this machine")


def _check_kv_cache(config: ServiceConfig, model: ModelConfig) -> None:
    """In the memory that is free before any weight is loaded: what does not fit now never will. config: resolved."""
    import torch

    from router.engine_builder import kv_capacity, kv_demand
    from router.kv_cache import KvCacheSpec

    settings = engine_settings(config)
    spec = KvCacheSpec(
        config=model, dtype=getattr(torch, config.dtype), block_size=model.block_size_for(config.block_size)
    )
    kv_capacity(kv_demand(spec, settings), settings, torch.device(config.device))


def check_ports(config: ServiceConfig) -> None:
    """Both ports can be bound now, on the interfaces where Ray Serve will listen: gRPC always on all of them."""
    for family, host in zip((socket.AF_INET, socket.AF_INET6), EVERYWHERE, strict=True):
        check_port(family, host, config.grpc_port, "grpc_port")
    try:
        family, *_, address = socket.getaddrinfo(config.http_host, config.http_port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"http_host: {config.http_host!r} is no address of this machine: {error.strerror}") from error
    check_port(family, str(address[0]), config.http_port, "http_port")


def check_port(family: socket.AddressFamily, host: str, port: int, key: str) -> None:
    """An IP version that the machine lacks cannot be taken. Raises ValueError naming key and port."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the servers do: connections in TIME_WAIT do not count, a listening socket does.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno in IP_VERSION_MISSING:
            if host in EVERYWHERE:
                return
            raise ValueError(f"http_host: {host} is no address of this machine") from error
        reason = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise ValueError(f"{key}: port {port} {reason} (on {host})") from error
