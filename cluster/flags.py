"""Command-line flags derived from ServiceConfig, so that names, defaults and help texts exist once."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from cluster.config import ConfigError, ServiceConfig, parse_config, read_config_file


def add_config_flags(parser: argparse.ArgumentParser, *, names: Collection[str] | None = None) -> None:
    """One flag per field (or per field in names), --max-model-len for max_model_len, and --config for a YAML file of
    ServiceConfig's keys."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the same keys; flags override it.")
    for name, field in ServiceConfig.model_fields.items():
        if names is not None and name not in names:
            continue
        value_type, metavar = _value_type(name, field)
        parser.add_argument(
            flag(name), dest=name, type=value_type, metavar=metavar, help=_help(field), default=argparse.SUPPRESS
        )


def config_from_flags(arguments: argparse.Namespace) -> ServiceConfig:
    """The keys of --config, overridden by the flags that were given. Raises ConfigError, OSError."""
    values = {} if arguments.config is None else _read(arguments.config)
    given = {name: value for name, value in vars(arguments).items() if name in ServiceConfig.model_fields}
    return parse_config(values | given)


def _read(path: Path) -> dict[str, Any]:
    values = read_config_file(path)
    unknown = values.keys() - ServiceConfig.model_fields.keys()
    if unknown:
        raise ConfigError(f"{path}: unknown key{'s' if len(unknown) > 1 else ''}: {', '.join(sorted(unknown))}")
    return values


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value_type(name: str, field: FieldInfo) -> tuple[type, str]:
    """What argparse turns the text into, and the placeholder in the help. Ranges are left to ServiceConfig."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return str, "{" + ",".join(kinds) + "}"
    if len(kinds) != 1 or kinds[0] not in (int, float, str):
        raise TypeError(f"ServiceConfig.{name}: no flag for a field of type {field.annotation}")
    return kinds[0], {int: "N", float: "X", str: "TEXT"}[kinds[0]]


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    return text if field.default is None or field.default_factory is not None else f"{text} Default: {field.default}."
