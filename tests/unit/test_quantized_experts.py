"""Experts kept as whole numbers: how far off they are, and that a row's bits still depend on that row alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_choice import KERNELS, kernels

from cluster.checkpoints.presets import create_checkpoint
from cluster.config import ServiceConfig
from cluster.service_model import read_model_config, resolve
from experts.expert_dtype import ExpertDtype, QuantizedDtype
from experts.expert_shape import ExpertShape
from experts.linear import pack_linear
from experts.mlp import Mlp, apply_experts
from experts.placement import ShardId, Slot
from experts.quantize import QuantizedWeight, quantize
from experts.shard_loader import load_shard, num_free_slots
from experts.shard_spec import ShardSpec

DTYPES = (torch.float32, torch.bfloat16)
KINDS: tuple[QuantizedDtype, ...] = ("int8", "int4")
# Of a matrix of normal numbers, as a share of its norm: rounding to 1/127, or 1/16, of the largest of some.
WEIGHT_ERROR = {"int8": (0.003, 0.012), "int4": (0.05, 0.12)}
# Whole segments, and one that is shorter than the others.
SHAPES = ((32, 16), (48, 80), (64, 576))
ROW_COUNTS = (1, 2, 3, 12, 13, 24, 25, 40, 260)


@pytest.fixture(autouse=True, params=KERNELS)
def kernel_choice(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels(request.param):
        yield request.param


def random_weight(num_out: int, num_in: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_out, num_in, generator=generator) / num_in**0.5).to(dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def exact(weight: QuantizedWeight) -> torch.Tensor:
    group = weight.numbers_OI.shape[1] if weight.bits == 8 else 64
    scales_OI = weight.scales_OG.double().repeat_interleave(group, dim=1)
    return weight.numbers_OI.double() * scales_OI[:, : weight.numbers_OI.shape[1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_quantised_weight(
    kind: QuantizedDtype, dtype: torch.dtype, kernel_choice: str
) -> None:
    # Plain torch rounds the weight to the model's dtype before it multiplies.
    tolerance = 4e-3 if dtype is torch.bfloat16 and kernel_choice == "torch" else 1e-5
    for num_out, num_in in SHAPES:
        weight_OI = random_weight(num_out, num_in, dtype)
        linear = pack_linear(weight_OI, kind)
        x_RI = random_weight(20, num_in, dtype, seed=1)
        wanted = x_RI.double() @ exact(quantize(weight_OI, kind)).T
        assert error(linear.wide(x_RI), wanted) < tolerance
        added = torch.ones(20, num_out, dtype=dtype)
        assert error(linear(x_RI, added_RO=added), wanted + 1) < 5e-3
        assert linear(x_RI).dtype is dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_weight_is_that_of_rounding(kind: QuantizedDtype) -> None:
    least, most = WEIGHT_ERROR[kind]
    weight_OI = random_weight(64, 512, torch.float32)
    assert least < error(exact(quantize(weight_OI, kind)), weight_OI) < most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_company_and_threads_change_no_bit_of_a_row(kind: QuantizedDtype, dtype: torch.dtype) -> None:
    mlp = random_mlp(64, 80, dtype, kind)
    x_RD = random_weight(max(ROW_COUNTS), 64, dtype, seed=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([mlp(x_RD[row : row + 1]) for row in range(30)])
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            for count in ROW_COUNTS:
                assert torch.equal(mlp(x_RD[:count])[:30], alone[:count])
            both = apply_experts([random_mlp(64, 80, dtype, kind, seed=9), mlp], x_RD, [17, len(x_RD) - 17])
            assert torch.equal(both[17:30], alone[17:])
    finally:
        torch.set_num_threads(threads)


def random_mlp(model: int, hidden: int, dtype: torch.dtype, kind: QuantizedDtype | None, seed: int = 0) -> Mlp:
    return Mlp(
        gate=pack_linear(random_weight(hidden, model, dtype, seed), kind),
        up=pack_linear(random_weight(hidden, model, dtype, seed + 1), kind),
        down=pack_linear(random_weight(model, hidden, dtype, seed + 2), kind),
    )


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("int4", 0.2)])
def test_an_expert_is_off_by_little(kind: QuantizedDtype, most: float) -> None:
    x_RD = torch.randn(50, 256, generator=torch.Generator().manual_seed(5))
    plain, quantised = (random_mlp(256, 512, torch.float32, each)(x_RD) for each in (None, kind))
    assert 0 < error(quantised, plain) < most


def test_bytes_are_those_that_plans_count_on(kernel_choice: str) -> None:
    shape = ExpertShape(hidden_size=512, intermediate_size=1024, num_experts=1)
    plain = shape.slot_bytes(ExpertDtype(compute="bfloat16"))
    for kind, least, most in (("int8", 1.9, 2.0), ("int4", 3.4, 3.6)):
        planned = shape.slot_bytes(ExpertDtype(compute="bfloat16", stored=kind))
        held = random_mlp(512, 1024, torch.bfloat16, kind).num_bytes
        assert held == planned if kernel_choice == "native" else planned * 0.98 < held <= planned
        assert least < plain / planned < most


def test_a_weight_of_zeros_stays_zero() -> None:
    for kind in KINDS:
        assert not pack_linear(torch.zeros(16, 64), kind).wide(torch.ones(3, 64)).any()


@pytest.mark.parametrize(("weight", "message"), [
    (torch.ones(16, 24), "in_features must be a multiple of 16 with expert_dtype int8 or int4, not 24"),
    (torch.ones(8, 16), "out_features must be a multiple of 16"),
    (torch.full((16, 16), float("inf")), "not finite"),
])  # fmt: skip
def test_what_cannot_be_quantised_is_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_linear(weight, "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_loads_what_its_plan_counted_on(kind: QuantizedDtype, kernel_choice: str, tmp_path: Path) -> None:
    folder = create_checkpoint("tiny-maverick", tmp_path / "tiny")
    config = read_model_config(folder)
    slots = tuple(Slot(config.moe_layers[0], expert) for expert in range(2))
    spec = ShardSpec(
        shard_id=ShardId("shard-0"), model=str(folder), shape=config.expert_shape, slots=slots, dtype="float32",
        device="cpu", num_threads=1, secret=b"s", weights_version=0, quantized=kind,
    )  # fmt: skip
    shard, plain = load_shard(spec), load_shard(replace(spec, quantized=None))
    planned = len(slots) * config.expert_shape.slot_bytes(spec.expert_dtype)
    assert shard.num_bytes == planned if kernel_choice == "native" else planned * 0.9 < shard.num_bytes <= planned
    assert num_free_slots(spec) > 3 * num_free_slots(replace(spec, quantized=None))
    x_RD = random_weight(5, config.hidden_size, torch.float32)
    layer, expert = slots[0]
    rows = [(expert, len(x_RD))]
    assert 0 < error(shard.apply(layer, x_RD, rows), plain.apply(layer, x_RD, rows)) < 0.25


def test_a_model_whose_width_does_not_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    config = read_model_config(create_checkpoint("tiny-maverick", tmp_path / "tiny"))
    service = ServiceConfig(model="m", expert_dtype="int8")
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 16"):
        resolve(service, replace(config, hidden_size=72), 2)
