"""Typed reading of one JSON object: every malformed value becomes a ConfigError that names its field and value.

Published config.json files write the same field as int, float or bool, and leave fields out or null; both are
read, and a missing or null field takes the default. What has the wrong meaning is never guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A checkpoint's configuration says something Arriero cannot serve. The message names file, field and value."""

    def __init__(self, field: str, value: object, reason: str, *, file_name: str = "config.json") -> None:
        super().__init__(f"{file_name}: {field} = {value!r}: {reason}")
        self.field = field
        self.value = value


class ConfigFields:
    """One JSON object, the path to it and the file it is in, which error messages carry."""

    def __init__(self, raw: Mapping[str, Any], path: str = "", *, file_name: str = "config.json") -> None:
        self.raw = raw
        self.path = path
        self.file_name = file_name

    def error(self, name: str, reason: str) -> ConfigError:
        return ConfigError(self.path + name, self.raw.get(name), reason, file_name=self.file_name)

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def is_null(self, name: str) -> bool:
        """An explicit null, which for some fields means something else than leaving the field out."""
        return name in self.raw and self.raw[name] is None

    def integer(self, name: str, default: int | None, *, minimum: int = 1) -> int:
        """An int, or a float that is a whole number. Raises ConfigError; also when missing without a default."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing")
        number = _whole(value)
        if number is None or number < minimum:
            raise self.error(name, f"must be a whole number >= {minimum}")
        return number

    def optional_integer(self, name: str, *, minimum: int = 0) -> int | None:
        return self.integer(name, None, minimum=minimum) if self.has(name) else None

    def number(self, name: str, default: float | None, *, above: float | None = None) -> float:
        """A finite float. ``above`` is an exclusive lower bound."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, "must be a finite number")
        if above is not None and value <= above:
            raise self.error(name, f"must be > {above:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """A bool or a number, of which only zero is False (early Llama 4 configs: attn_temperature_tuning: 4)."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool | int | float):
            raise self.error(name, "must be true, false or a number")
        return bool(value)

    def text(self, name: str, default: str) -> str:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, "must be a string")
        return value

    def integers(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers or bools as ints; None when missing or null."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.error(name, "must be a list of whole numbers")
        numbers = [int(item) if isinstance(item, bool) else _whole(item) for item in value]
        if any(number is None or number < 0 for number in numbers):
            raise self.error(name, "must be a list of whole numbers >= 0")
        return tuple(number for number in numbers if number is not None)

    def nested(self, name: str) -> ConfigFields | None:
        """The object under ``name``; None when missing, null or empty."""
        value = self.raw.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, "must be an object")
        return ConfigFields(value, f"{self.path}{name}.", file_name=self.file_name)


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value)
