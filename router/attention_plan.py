"""What attention does in one step, worked out once per step and KV group and then used by each of its layers.

A *span* is a run of queries of one sequence that attend causally to the KV positions from ``origin`` on: for
global layers a slice's whole run with origin 0, for local layers one per attention chunk the slice touches, with
the chunk's start as origin (llama4.md §2.2). Spans are cut into *tiles* of a bounded number of query rows. A query
row is a (token, query head) pair; per KV head a tile has the rows

    token 0 head 0, token 0 head 1, ..., token 1 head 0, ...        heads: the query heads that share the KV head

padded to a multiple of 8, because float32 bmm gives a row the same bits for every such count, and not otherwise.
Tiles of equal row count form a *batch*, decode tokens among themselves. A batch walks over KV in *splits* of a
fixed number of positions counted from the origin, so that a row's sums are made of the same parts whatever it is
batched with. A tile with fewer splits than its neighbours drops out early: tiles stand in descending order.

Shapes: N tiles, K KV heads, R padded query rows of a tile and KV head, P positions per split, T tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from router.kv_cache import NULL_BLOCK

POSITIONS_PER_SPLIT = 128
ROW_MULTIPLE = 8
MAX_TILE_ROWS = 256
MAX_BATCH_NUMBERS = 1 << 19
"""Bounds the scores of a batch's split, and the keys gathered for it: 2 MiB of float32 each, to stay in cache."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    num_query_heads: int
    num_kv_heads: int

    @property
    def group_size(self) -> int:
        return self.num_query_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Queries ``first_token .. first_token + num_tokens`` of the step's tokens, at positions ``start ..``.

    ``blocks`` covers the positions from ``origin`` on, one block table entry per block.
    """

    first_token: int
    num_tokens: int
    start: int
    origin: int
    blocks: Sequence[int]

    @property
    def num_kv(self) -> int:
        """KV positions that the last query sees, counted from the origin."""
        return self.start + self.num_tokens - self.origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One split of the first ``num_tiles`` tiles. Of those, the ones from ``first_masked`` on need the mask."""

    num_tiles: int
    block_rows: torch.Tensor
    """[num_tiles * K * blocks per split]: rows of the cache seen as [B*K, S*D]."""
    first_masked: int
    hidden: torch.Tensor | None
    """bool [num_tiles - first_masked, 1, R, P]: True where a query must not look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileBatch:
    num_tiles: int
    num_rows: int
    query_rows: torch.Tensor
    """[N * K * R]: rows of the queries seen as [T*H, D]; padding repeats row 0."""
    splits: tuple[Split, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    heads: Heads
    positions_per_split: int
    kv_rows: torch.Tensor
    """[T * K]: where the step's keys and values go, for LayerKv.write."""
    batches: tuple[TileBatch, ...]
    output_rows: torch.Tensor
    """[T * H]: where each (token, head) lies in the batches' concatenated [N*K*R] rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlanner:
    """Turns spans into a plan."""

    heads: Heads
    head_dim: int
    block_size: int
    device: torch.device

    @property
    def positions_per_split(self) -> int:
        """A whole number of blocks, the same for every step of a service.

        Also where an attention chunk is shorter: bmm has other kernels for small matrices, whose bits depend on
        the number of rows.
        """
        return max(self.block_size, POSITIONS_PER_SPLIT // self.block_size * self.block_size)

    def plan(self, spans: Sequence[Span], slots_T: IntArray) -> AttentionPlan:
        """``slots_T``: where each token of the step is stored, block * block size + place in the block."""
        tiles = sorted((tile for span in spans for tile in self._tiles(span)), key=self._order, reverse=True)
        batches: list[TileBatch] = []
        output_rows = np.zeros((len(slots_T), self.heads.num_query_heads), dtype=np.int64)
        first_row = 0
        for num_rows, same in groupby(tiles, key=self._num_rows):
            for batch_tiles in self._bounded(list(same), num_rows):
                layout = _RowLayout.of(batch_tiles, num_rows, self.heads)
                layout.place_outputs(output_rows, first_row)
                first_row += layout.num_tiles * self.heads.num_kv_heads * num_rows
                batches.append(self._batch(batch_tiles, layout))
        return AttentionPlan(
            heads=self.heads,
            positions_per_split=self.positions_per_split,
            kv_rows=self._kv_rows(slots_T),
            batches=tuple(batches),
            output_rows=self._to_device(output_rows),
        )

    def _tiles(self, span: Span) -> list[Span]:
        """A span as tiles of at most MAX_TILE_ROWS query rows per KV head, each with the KV it can see."""
        tokens_per_tile = max(1, MAX_TILE_ROWS // self.heads.group_size)
        tiles = []
        for offset in range(0, span.num_tokens, tokens_per_tile):
            num_tokens = min(tokens_per_tile, span.num_tokens - offset)
            num_kv = span.start + offset + num_tokens - span.origin
            tile = Span(
                first_token=span.first_token + offset,
                num_tokens=num_tokens,
                start=span.start + offset,
                origin=span.origin,
                blocks=span.blocks[: -(-num_kv // self.block_size)],
            )
            tiles.append(tile)
        return tiles

    def _num_rows(self, tile: Span) -> int:
        return -(-tile.num_tokens * self.heads.group_size // ROW_MULTIPLE) * ROW_MULTIPLE

    def _num_splits(self, tile: Span) -> int:
        return -(-tile.num_kv // self.positions_per_split)

    def _order(self, tile: Span) -> tuple[int, int, int]:
        """Tiles of one batch together; in it those that reach furthest first, so that splits shed a tail."""
        return self._num_rows(tile), self._num_splits(tile), tile.start - tile.origin

    def _bounded(self, tiles: list[Span], num_rows: int) -> list[list[Span]]:
        """Batches whose scores and gathered keys stay within MAX_BATCH_NUMBERS, or that are one tile."""
        numbers_per_position = self.heads.num_kv_heads * max(num_rows, self.head_dim)
        size = max(1, MAX_BATCH_NUMBERS // (numbers_per_position * self.positions_per_split))
        batches = [tiles[first : first + size] for first in range(0, len(tiles), size)]
        if self.heads.num_kv_heads > 1:
            return batches
        # bmm with a batch of one takes another path than with two: a lone matrix gets an idle companion.
        idle = Span(first_token=0, num_tokens=0, start=0, origin=0, blocks=())
        return [batch if len(batch) > 1 else [*batch, idle] for batch in batches]

    def _batch(self, tiles: list[Span], layout: _RowLayout) -> TileBatch:
        num_splits = self._num_splits(tiles[0])
        blocks_per_split = self.positions_per_split // self.block_size
        tables = np.full((len(tiles), num_splits * blocks_per_split), NULL_BLOCK, dtype=np.int64)
        for row, tile in zip(tables, tiles, strict=True):
            row[: len(tile.blocks)] = tile.blocks
        return TileBatch(
            num_tiles=layout.num_tiles,
            num_rows=layout.num_rows,
            query_rows=self._to_device(layout.query_rows()),
            splits=tuple(self._split(index, tiles, tables, layout) for index in range(num_splits)),
        )

    def _split(self, index: int, tiles: list[Span], tables: IntArray, layout: _RowLayout) -> Split:
        size = self.positions_per_split
        fewest = 1 if self.heads.num_kv_heads > 1 else 2
        num_tiles = max(fewest, sum(1 for tile in tiles if self._num_splits(tile) > index))
        # A tile's first query sees the least; tiles that see the whole split come first but for a few.
        starts = (tile.start - tile.origin for tile in tiles[:num_tiles])
        first_masked = next((i for i, start in enumerate(starts) if start < (index + 1) * size - 1), num_tiles)
        blocks = tables[:num_tiles, index * size // self.block_size : (index + 1) * size // self.block_size]
        head = np.arange(self.heads.num_kv_heads)[None, :, None]
        hidden = None
        if first_masked < num_tiles:
            keys = np.arange(index * size, (index + 1) * size)
            hidden = self._to_mask(hidden_keys(layout.row_positions[first_masked:num_tiles], keys))
        return Split(
            num_tiles=num_tiles,
            block_rows=self._to_device(blocks[:, None, :] * self.heads.num_kv_heads + head),
            first_masked=first_masked,
            hidden=hidden,
        )

    def _kv_rows(self, slots_T: IntArray) -> torch.Tensor:
        head = np.arange(self.heads.num_kv_heads)[None, :]
        blocks_T, places_T = np.divmod(slots_T, self.block_size)
        first_row = (blocks_T[:, None] * self.heads.num_kv_heads + head) * self.block_size
        return self._to_device(first_row + places_T[:, None])

    def _to_device(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(-1)).to(self.device)

    def _to_mask(self, hidden_NRP: npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(hidden_NRP[:, None]).to(self.device)


def hidden_keys(row_positions_NR: IntArray, keys_P: IntArray) -> npt.NDArray[np.bool_]:
    """[N, R, P]: causal. All positions count from the tile's origin."""
    return keys_P[None, None, :] > row_positions_NR[:, :, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowLayout:
    """Which (token, head) each query row of a batch of tiles is."""

    heads: Heads
    num_rows: int
    tokens_NR: IntArray
    head_in_group_R: IntArray
    is_real_NR: npt.NDArray[np.bool_]
    row_positions: IntArray
    """[N, R], from the tile's origin. Padding rows stand at position 0: with nothing to see they would be NaN."""

    @classmethod
    def of(cls, tiles: list[Span], num_rows: int, heads: Heads) -> _RowLayout:
        token_in_tile_R, head_in_group_R = np.divmod(np.arange(num_rows), heads.group_size)
        first_token_N, num_tokens_N, start_N = np.array(
            [(tile.first_token, tile.num_tokens, tile.start - tile.origin) for tile in tiles], dtype=np.int64
        ).T
        is_real_NR = token_in_tile_R < num_tokens_N[:, None]
        return cls(
            heads=heads,
            num_rows=num_rows,
            tokens_NR=np.where(is_real_NR, first_token_N[:, None] + token_in_tile_R, 0),
            head_in_group_R=head_in_group_R,
            is_real_NR=is_real_NR,
            row_positions=np.where(is_real_NR, start_N[:, None] + token_in_tile_R, 0),
        )

    @property
    def num_tiles(self) -> int:
        return len(self.tokens_NR)

    def query_rows(self) -> IntArray:
        """[N, K, R] rows of the queries seen as [T*H, D]."""
        first_head_K1 = np.arange(self.heads.num_kv_heads)[:, None] * self.heads.group_size
        heads_KR = first_head_K1 + self.head_in_group_R
        rows = self.tokens_NR[:, None, :] * self.heads.num_query_heads + heads_KR
        return np.where(self.is_real_NR[:, None, :], rows, 0)

    def place_outputs(self, output_rows_TH: IntArray, first_row: int) -> None:
        """Writes where each real (token, head) of these tiles lies in the output that starts at ``first_row``."""
        shape = (self.num_tiles, self.heads.num_kv_heads, self.num_rows)
        positions = first_row + np.arange(np.prod(shape)).reshape(shape)
        is_real = np.broadcast_to(self.is_real_NR[:, None, :], shape)
        output_rows_TH.reshape(-1)[self.query_rows()[is_real]] = positions[is_real]
