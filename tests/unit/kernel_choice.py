"""Chooses between compiled kernels and plain torch for a part of a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from experts.native.build import NoCompilerError, find_compiler
from experts.native.kernels import CHOICE, expert_kernels
from router.native.kernels import layer_kernels

KERNELS = ("native", "torch")


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """What is built within uses these kernels. Skips the test where there is no C compiler for the native ones."""
    if choice == "native":
        require_compiler()
    with patch.dict(os.environ, {CHOICE: choice}):
        _forget()
        try:
            assert (layer_kernels() is not None) == (choice == "native")
            yield
        finally:
            _forget()


def require_compiler() -> None:
    """Skips the test where there is none."""
    try:
        find_compiler()
    except NoCompilerError as error:
        pytest.skip(str(error))


def _forget() -> None:
    expert_kernels.cache_clear()
    layer_kernels.cache_clear()
