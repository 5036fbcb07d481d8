"""The best next change to one layer: what takes load off its busiest shard. Pure.

Three kinds of change: a move, a copy (only of experts whose rows may be split: any other would just be read twice),
and a swap of two experts. Each is judged by the two shards that it concerns: how far the sum of their squares falls,
per slot that has to be loaded.

Shapes: E experts of the layer, S shards, N nodes, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.balance.busy_time import Bools, Floats, Ints
from cluster.balance.layer_draft import Cell, LayerDraft

# A copy takes memory for good. Where a move does nearly as well, it is preferred.
_WORTH_OF_A_COPY = 0.9
# Scores are compared to this many digits, so that equal changes are told apart by the rules and not by rounding.
_DIGITS = 9


class Step(NamedTuple):
    add: tuple[Cell, ...]
    remove: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surroundings:
    """can_take_S: shards that have room for another slot. node_S: each shard's node, as a number. busy_S: how busy
    each shard is in all layers together."""

    can_take_S: Bools
    node_S: Ints
    busy_S: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidates:
    """Of one kind. other_C: the expert that comes back in a swap. off_C and on_C: by how many seconds the source
    gets less busy, and the target more."""

    expert_C: Ints
    target_C: Ints
    other_C: Ints | None
    off_C: Floats
    on_C: Floats
    worth: float


def best_step(layer: LayerDraft, around: Surroundings) -> Step | None:
    """None when nothing takes load off the busiest shard without making another as busy."""
    source = int(np.argmax(layer.busy_S))
    kinds = (_moves(layer, around, source), _copies(layer, around, source), _swaps(layer, around, source))
    best: tuple[tuple[float, ...], Step] | None = None
    for turn, candidates in enumerate(kinds):
        found = _best_of(candidates, layer.busy_S, around.busy_S, source)
        if found is None:
            continue
        score, index = found
        expert, target = int(candidates.expert_C[index]), int(candidates.target_C[index])
        rank = (score, -float(around.busy_S[target]), -turn)
        if best is None or rank > best[0]:
            best = rank, _step(turn, expert, source, target, candidates, index)
    return None if best is None else best[1]


def _step(turn: int, expert: int, source: int, target: int, candidates: _Candidates, index: int) -> Step:
    there, back = (expert, target), (expert, source)
    if candidates.other_C is not None:
        other = int(candidates.other_C[index])
        return Step((there, (other, source)), (back, (other, target)))
    return Step((there,), (back,) if turn == 0 else ())


def _best_of(candidates: _Candidates, layer_S: Floats, busy_S: Floats, source: int) -> tuple[float, int] | None:
    """(score, position) of the best candidate. Ties go to the shard that is less busy in all, then the first."""
    from_s, to_C = layer_S[source], layer_S[candidates.target_C]
    after_source_C, after_target_C = from_s - candidates.off_C, to_C + candidates.on_C
    score_C = from_s**2 + to_C**2 - after_source_C**2 - after_target_C**2
    helps_C = (np.maximum(after_source_C, after_target_C) < from_s * (1 - 10.0**-_DIGITS)) & (score_C > 0)
    if not helps_C.any():
        return None
    rounded_C = np.round(np.where(helps_C, score_C * candidates.worth / from_s**2, -1), _DIGITS)
    order = np.lexsort((np.arange(len(rounded_C)), busy_S[candidates.target_C], -rounded_C))
    return float(rounded_C[order[0]]), int(order[0])


def _moves(layer: LayerDraft, around: Surroundings, source: int) -> _Candidates:
    allowed_ES = _from(layer, around, source) & _may_move(layer, around.node_S, source)
    expert_C, target_C = np.nonzero(allowed_ES)
    share_C = layer.shares_ES[expert_C, source]
    return _Candidates(
        expert_C=expert_C,
        target_C=target_C,
        other_C=None,
        off_C=share_C * layer.busy_ES[expert_C, source],
        on_C=share_C * layer.busy_ES[expert_C, target_C],
        worth=1.0,
    )


def _copies(layer: LayerDraft, around: Surroundings, source: int) -> _Candidates:
    allowed_ES = _from(layer, around, source) & layer.splittable_E[:, None]
    fresh_ES = _copies_on_node(layer, around.node_S)[:, around.node_S] == 0
    # On a node without a copy, as long as such a one has room.
    allowed_ES &= fresh_ES | ~(allowed_ES & fresh_ES).any(axis=1, keepdims=True)
    expert_C, target_C = np.nonzero(allowed_ES)
    busy_S = layer.busy_S
    off_all_C, on_all_C = layer.busy_ES[expert_C, source], layer.busy_ES[expert_C, target_C]
    to_level_C = (busy_S[source] - busy_S[target_C]) / (off_all_C + on_all_C)
    share_C = np.clip(to_level_C, 0, layer.shares_ES[expert_C, source])
    return _Candidates(
        expert_C=expert_C,
        target_C=target_C,
        other_C=None,
        off_C=share_C * off_all_C,
        on_C=share_C * on_all_C,
        worth=_WORTH_OF_A_COPY,
    )


def _swaps(layer: LayerDraft, around: Surroundings, source: int) -> _Candidates:
    there_ES = _from(layer, around, source) & _may_move(layer, around.node_S, source)
    other_O, shard_O = np.nonzero(
        layer.held_ES & ~layer.held_ES[:, [source]] & around.can_take_S & around.can_take_S[source]
    )
    back_O = _may_move_to(layer, around.node_S, other_O, shard_O, source)
    other_O, shard_O = other_O[back_O], shard_O[back_O]
    expert_C, pair_C = np.nonzero(there_ES[:, shard_O])
    other_C, target_C = other_O[pair_C], shard_O[pair_C]
    share_C, other_share_C = layer.shares_ES[expert_C, source], layer.shares_ES[other_C, target_C]
    return _Candidates(
        expert_C=expert_C,
        target_C=target_C,
        other_C=other_C,
        off_C=share_C * layer.busy_ES[expert_C, source] - other_share_C * layer.busy_ES[other_C, source],
        on_C=share_C * layer.busy_ES[expert_C, target_C] - other_share_C * layer.busy_ES[other_C, target_C],
        worth=0.5,
    )


def _from(layer: LayerDraft, around: Surroundings, source: int) -> Bools:
    """[E, S]: experts that cost the source something, and the shards that could take them."""
    has_load_E = layer.load_ES[:, source] > 0
    allowed_ES: Bools = has_load_E[:, None] & ~layer.held_ES & around.can_take_S
    return allowed_ES


def _copies_on_node(layer: LayerDraft, node_S: Ints) -> Ints:
    """[E, N]"""
    on_node_SN = node_S[:, None] == np.arange(node_S.max() + 1)
    copies_EN: Ints = layer.held_ES.astype(np.int64) @ on_node_SN.astype(np.int64)
    return copies_EN


def _may_move(layer: LayerDraft, node_S: Ints, source: int) -> Bools:
    """[E, S]: moves from the source that leave an expert's copies on as many nodes as before."""
    copies_EN = _copies_on_node(layer, node_S)
    others_ES = copies_EN[:, node_S] - (node_S == node_S[source])
    allowed_ES: Bools = (others_ES == 0) | (copies_EN[:, node_S[source], None] > 1)
    return allowed_ES


def _may_move_to(layer: LayerDraft, node_S: Ints, expert_O: Ints, source_O: Ints, target: int) -> Bools:
    """[O]: the same for one expert and source each, all to the same target."""
    copies_EN = _copies_on_node(layer, node_S)
    others_O = copies_EN[expert_O, node_S[target]] - (node_S[source_O] == node_S[target])
    allowed_O: Bools = (others_O == 0) | (copies_EN[expert_O, node_S[source_O]] > 1)
    return allowed_O
