"""The versions of the weights that a service has at a time, each with its own line of epochs. Pure.

served   1: epoch 4            1: epoch 4           2: epoch 5            2: epoch 5
other    -                     2: prepares 5        1: epoch 4            -
         as it was             the next one loads   new requests get 2    the last request of 1 has ended
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.control.desired_state import DesiredState, OtherWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLine:
    """model: the folder or hub id of the weights. epoch: in force, preparing: what may follow it; both as in
    DesiredState."""

    weights_version: int
    model: str
    epoch: dict[str, Any] | None
    preparing: dict[str, Any] | None


def lines_of(state: DesiredState) -> dict[int, WeightLine]:
    """By version, the served one first."""
    served = WeightLine(
        weights_version=state.weights_version,
        model=served_model(state),
        epoch=state.epoch,
        preparing=state.preparing,
    )
    lines = {served.weights_version: served}
    if state.other is not None:
        lines[state.other.weights_version] = WeightLine(**msgspec.structs.asdict(state.other))
    return lines


def served_model(state: DesiredState) -> str:
    model: str = state.config["model"] if state.model is None else state.model
    return model


def line_changes(state: DesiredState, weights_version: int, **fields: Any) -> Mapping[str, Any]:
    """What of the state changes with epoch or preparing of this version. Raises KeyError for one that is not there."""
    if weights_version == state.weights_version:
        return fields
    if state.other is None or state.other.weights_version != weights_version:
        raise KeyError(f"weights version {weights_version} is not there")
    return {"other": msgspec.structs.replace(state.other, **fields)}


def switch_changes(state: DesiredState) -> Mapping[str, Any]:
    """From now on new requests get the other version; what was served is the other one."""
    assert state.other is not None
    return {
        "weights_version": state.other.weights_version,
        "model": state.other.model,
        "epoch": state.other.epoch,
        "preparing": state.other.preparing,
        "other": OtherWeights(
            weights_version=state.weights_version,
            model=served_model(state),
            epoch=state.epoch,
            preparing=state.preparing,
        ),
    }
