"""The compiled kernels against plain torch and float64, and the promise that a row's bits are its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_choice import kernels
from torch.nn.functional import silu

from experts.expert_dtype import QuantizedDtype
from experts.linear import pack_linear
from experts.mlp import Mlp, apply_experts
from experts.native import build
from experts.native.kernels import ExpertKernels, expert_kernels
from router.attention_plan import Heads, Span
from router.kv_cache import LayerKv
from router.native.kernels import LayerKernels, PositionChanges, layer_kernels
from router.norm import rms_norm, rms_normalize
from router.rope import rotate, rotation
from router.tile_plan import can_plan_tiles, plan_tiles

DTYPES = (torch.float32, torch.bfloat16)
KINDS: tuple[QuantizedDtype | None, ...] = (None, "int8", "int4")
# Of results around 1: float32 sums of some thousand products; one rounding to bfloat16.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SHAPES = [(16, 16), (5, 7), (33, 14), (64, 1000), (100, 64), (256, 4500)]
ROW_COUNTS = (1, 2, 3, 11, 12, 13, 40, 250)


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with kernels("native"):
        yield


@pytest.fixture
def experts() -> ExpertKernels:
    found = expert_kernels()
    if found is None:
        pytest.skip("on this processor products are oneDNN's")
    return found


@pytest.fixture
def layers() -> LayerKernels:
    found = layer_kernels()
    assert found is not None
    return found


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_products_are_right_for_every_row_count(
    experts: ExpertKernels, threads: int, dtype: torch.dtype, num_out: int, num_in: int
) -> None:
    weight = randn(num_out, num_in, dtype=dtype, seed=1) / num_in**0.5
    packed = experts.pack(weight)
    for num_rows in ROW_COUNTS:
        x, added = randn(num_rows, num_in, dtype=dtype, seed=2), randn(num_rows, num_out, dtype=dtype, seed=3)
        exact = x.double() @ weight.double().T
        assert_close(experts.matmul(x, packed), exact, dtype)
        assert_close(experts.matmul(x, packed, added_RO=added), exact + added.double(), dtype)
        wide = experts.matmul(x, packed, wide=True)
        assert wide.dtype == torch.float32
        assert_close(wide, exact, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_a_rows_bits_depend_on_no_other_row(
    experts: ExpertKernels, threads: int, dtype: torch.dtype, num_out: int, num_in: int
) -> None:
    packed = experts.pack(randn(num_out, num_in, dtype=dtype, seed=1))
    x = randn(max(ROW_COUNTS), num_in, dtype=dtype, seed=2)
    alone = torch.cat([experts.matmul(row, packed) for row in x.split(1)])
    for num_rows in ROW_COUNTS:
        assert torch.equal(experts.matmul(x[:num_rows], packed), alone[:num_rows])


def random_mlp(
    model: int, width: int, dtype: torch.dtype, seed: int, quantized: QuantizedDtype | None = None
) -> tuple[Mlp, tuple[torch.Tensor, ...]]:
    shapes = ((width, model), (width, model), (model, width))
    raw = tuple(randn(*shape, dtype=dtype, seed=seed + i) / shape[1] ** 0.5 for i, shape in enumerate(shapes))
    gate, up, down = (pack_linear(weight, quantized) for weight in raw)
    return Mlp(gate=gate, up=up, down=down), raw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("model", "width"), [(64, 48), (14, 7), (300, 520)])
def test_experts_together_have_the_bits_of_each_alone(
    experts: ExpertKernels, threads: int, dtype: torch.dtype, model: int, width: int
) -> None:
    counts = (1, 3, 17, 250, 2)
    made = [random_mlp(model, width, dtype, seed=10 * index) for index in range(len(counts))]
    x = randn(sum(counts), model, dtype=dtype, seed=7)
    together = apply_experts([mlp for mlp, _raw in made], x, counts)
    for part, got, (mlp, (gate, up, down)) in zip(x.split(counts), together.split(counts), made, strict=True):
        exact = (silu(part.double() @ gate.double().T) * (part.double() @ up.double().T)) @ down.double().T
        assert_close(got, exact, dtype)
        assert torch.equal(torch.cat([mlp(row) for row in part.split(1)]), got)
        added = randn(*part.shape, dtype=dtype, seed=8)
        assert_close(mlp(part, added_RD=added), exact + added.double(), dtype)


def test_no_rows_are_no_work(experts: ExpertKernels) -> None:
    mlp, _raw = random_mlp(8, 4, torch.float32, seed=0)
    assert mlp(torch.zeros(0, 8)).shape == (0, 8)
    assert mlp.down(torch.zeros(0, 4)).shape == (0, 8)
    assert apply_experts([], torch.zeros(0, 8), []).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 64, 1000])
def test_norms_are_those_of_plain_torch(layers: LayerKernels, threads: int, dtype: torch.dtype, width: int) -> None:
    x, weight = randn(40, width, dtype=dtype), randn(width, dtype=dtype, seed=1)
    normed = layers.rms_norm(x, weight, 1e-5)
    with kernels("torch"):
        assert_close(normed, rms_norm(x, weight, 1e-5), dtype)
    assert torch.equal(torch.cat([layers.rms_norm(row, weight, 1e-5) for row in x.split(1)]), normed)


HEADS = [(4, 1, 16, 64), (9, 3, 7, 14), (5, 1, 4, 16), (40, 8, 16, 128), (8, 8, 1, 32), (6, 2, 32, 7)]


class Cache:
    """One sequence of 211 tokens at scattered blocks, alone in its cache but for NaN where nothing was stored."""

    num_tokens = 211

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        num_query_heads, num_kv_heads, self.block_size, head_dim = shape
        self.heads = Heads(num_query_heads=num_query_heads, num_kv_heads=num_kv_heads)
        num_blocks = -(-self.num_tokens // self.block_size)
        self.blocks = (torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)) + 1).tolist()
        keys, values = (torch.zeros(num_blocks + 1, num_kv_heads, self.block_size, head_dim, dtype=dtype) for _ in "kv")
        keys[self.blocks[-1]] = float("nan")
        self.kv = LayerKv(keys, values)
        self.projected = randn(self.num_tokens, (num_query_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, seed=4)
        self.q, self.k, self.v = (
            part.unflatten(1, (-1, head_dim))
            for part in self.projected.split([count * head_dim for count in (num_query_heads, *[num_kv_heads] * 2)], 1)
        )

    def attend(self, counts: list[int], changes: PositionChanges, layers: LayerKernels) -> torch.Tensor:
        """The tokens in steps of so many."""
        outputs, start = [], 0
        for count in counts:
            span = Span(first_token=0, num_tokens=count, start=start, origin=0, blocks=self.blocks)
            slots = torch.tensor(
                [self.blocks[p // self.block_size] * self.block_size + p % self.block_size
                 for p in range(start, start + count)]
            )  # fmt: skip
            plan = plan_tiles([span], slots.numpy(), self.heads, layers)
            outputs.append(plan.attend(self.projected[start : start + count], self.kv, changes))
            start += count
        return torch.cat(outputs)

    def dense(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        group, causal = self.heads.group_size, torch.ones(self.num_tokens, self.num_tokens).triu(1).bool()
        keys, values = (part.double().repeat_interleave(group, 1) for part in (k, self.v))
        weights = torch.einsum("qhd,khd->hqk", q.double(), keys) * q.shape[-1] ** -0.5
        weights = weights.masked_fill(causal, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
def test_attention_equals_dense_attention_however_it_is_cut(
    layers: LayerKernels, threads: int, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    cache = Cache(shape, dtype)
    whole = cache.attend([cache.num_tokens], PositionChanges(), layers)
    assert_close(whole, cache.dense(cache.q, cache.k), dtype)
    for counts in ([1] * cache.num_tokens, [100, 1, 1, 64, 45]):
        assert torch.equal(Cache(shape, dtype).attend(counts, PositionChanges(), layers), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_rotated_queries_and_keys_are_those_of_plain_torch(
    layers: LayerKernels, dtype: torch.dtype, norm_eps: float | None
) -> None:
    cache = Cache(HEADS[1], dtype)
    by = rotation(torch.arange(cache.num_tokens), 0.1 * torch.arange(1, 8))
    q, k = (rotate(part, by) for part in (cache.q, cache.k))
    if norm_eps is not None:
        q, k = rms_normalize(q, norm_eps), rms_normalize(k, norm_eps)
    changes = PositionChanges(rotation=by, norm_eps=norm_eps)
    assert_close(cache.attend([cache.num_tokens], changes, layers), cache.dense(q, k), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_multiplies_the_queries(layers: LayerKernels, dtype: torch.dtype) -> None:
    cache = Cache(HEADS[0], dtype)
    temperature = 1.0 + randn(cache.num_tokens).abs()
    heated = (cache.q * temperature[:, None, None]).to(dtype)
    changes = PositionChanges(temperature_T=temperature)
    assert_close(cache.attend([cache.num_tokens], changes, layers), cache.dense(heated, cache.k), dtype)


def test_a_value_that_is_not_finite_is_stored_as_one_that_is(layers: LayerKernels) -> None:
    cache = Cache((1, 1, 16, 4), torch.bfloat16)
    cache.v[0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    cache.attend([cache.num_tokens], PositionChanges(), layers)
    stored = cache.kv.values_BKSD[cache.blocks[0], 0, 0]
    assert stored.tolist() == [0.0, torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min, 1.0]


def test_the_log_of_the_sum_merges_outputs_over_disjoint_keys(layers: LayerKernels) -> None:
    cache = Cache(HEADS[0], torch.float32)
    whole = cache.attend([cache.num_tokens], PositionChanges(), layers)[-1:]
    parts, sums = [], []
    for origin, stop in ((0, 128), (128, cache.num_tokens)):
        blocks = cache.blocks[origin // 16 :]
        # The last token's query over the keys of origin..stop.
        span = Span(first_token=0, num_tokens=1, start=stop - 1, origin=origin, blocks=blocks)
        plan = plan_tiles([span], torch.tensor([0]).numpy(), cache.heads, layers)
        sums.append(torch.empty(1, 4))
        q = cache.projected[-1:, : 4 * 64].contiguous()
        parts.append(layers.attend(q, 4, cache.kv, plan.tiles_N4, plan.tables, log_sum_exp_TH=sums[-1]))
    weights = torch.stack(sums).softmax(0)[..., None]
    merged = sum(w * part.view(1, 4, 64) for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged.flatten(1), whole, rtol=0, atol=2e-6)


def test_shapes_that_the_attention_has_no_room_for_are_left_to_torch() -> None:
    assert can_plan_tiles(Heads(num_query_heads=128, num_kv_heads=2), 128)
    assert not can_plan_tiles(Heads(num_query_heads=130, num_kv_heads=2), 128)
    assert not can_plan_tiles(Heads(num_query_heads=2, num_kv_heads=2), 2048)


@pytest.mark.parametrize("width", [1, 16, 100, 70_000])
def test_the_largest_of_each_row_and_its_place(layers: LayerKernels, threads: int, width: int) -> None:
    rows = randn(6, width)
    values, places = layers.largest_of_rows(rows)
    assert torch.equal(values, rows.amax(-1))
    assert torch.equal(places, rows.argmax(-1))
    assert layers.largest_of_rows(torch.zeros(2, width))[1].tolist() == [0, 0]


@pytest.mark.parametrize("place", [0, 20, 99])
def test_a_row_that_is_not_finite_is_told(layers: LayerKernels, place: int) -> None:
    rows = randn(4, 100)
    rows[0, place] = float("nan")
    rows[1, place] = float("inf")
    rows[2, place] = -float("inf")
    assert layers.largest_of_rows(rows)[0].isfinite().tolist() == [False, False, True, True]


@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"), reason="needs AVX2")
def test_a_processor_with_half_as_wide_vectors_and_no_bfloat16_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute(dtype: torch.dtype) -> list[torch.Tensor]:
        outputs = []
        for kind in KINDS:
            mlp, _raw = random_mlp(304, 528, dtype, 1, kind)
            x = randn(40, 304, dtype=dtype, seed=2)
            outputs.append(torch.cat([mlp(row) for row in x.split(1)]))
            assert torch.equal(mlp(x), outputs[-1])
        layers = layer_kernels()
        assert layers is not None
        attended = Cache(HEADS[0], dtype).attend([100, 1, 1, 64, 45], PositionChanges(), layers)
        return [*outputs, attended]

    here = {dtype: compute(dtype) for dtype in DTYPES}
    narrow = [flag.replace("native", "haswell") for flag in build.COMPILE]
    monkeypatch.setattr(build, "COMPILE", narrow)
    with kernels("native"):
        for dtype, expected in here.items():
            for got, wanted in zip(compute(dtype), expected, strict=True):
                assert_close(got, wanted, dtype)
                # Both add products to float32 sums one by one, without rounding the product.
                assert dtype != torch.float32 or torch.equal(got, wanted)
