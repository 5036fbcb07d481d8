"""Trains the demo model from nothing and writes its checkpoint folder: `python scripts/train_demo/train.py --out DIR`.

One seed decides everything: the first weights, the samples, their order. Needs torch and this repository.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoint import CONFIG, rounded, write_checkpoint
from model import Balance, TrainingModel, initial_state
from rows import Mix, Rows, as_batch, turn_of
from torch import Tensor
from torch.nn.functional import cross_entropy

from cluster.checkpoints.demo_tasks import TASKS, held_out_samples

PEAK_RATE = 2e-3
WARMUP_STEPS = 100
ECHO_SHARE = 0.4
WEIGHT_DECAY = 0.05
BALANCE_WEIGHT = 0.01
# Between these shares of the steps the lists of recall grow, and echoes fade.
GROWTH = (0.08, 0.4)
# Recall comes first, for it is found late or never; sums take the longest from then on.
RECALL_FIRST_UNTIL = 0.3
EARLY_SHARES = {"sort": 0.2, "reverse": 0.15, "add": 0.3, "recall": 0.35}
LATE_SHARES = {"sort": 0.28, "reverse": 0.1, "add": 0.4, "recall": 0.22}
EARLY_REPEATING_SHARE, LATE_REPEATING_SHARE = 0.6, 0.3
EVALUATED, EVALUATED_LENGTH = 200, 144
LOG_STEPS, SAVE_STEPS = 50, 250
NUM_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a step sees until this share of the steps: so many conversations of so many tokens."""

    until: float
    num_rows: int
    length: int


# Short conversations first: they are cheap, and most of their turns are the first. Each stage must hold the lists of
# its time.
STAGES = (
    Stage(until=0.25, num_rows=24, length=96),
    Stage(until=0.92, num_rows=16, length=192),
    Stage(until=1.0, num_rows=12, length=384),
)


def learning_rate(step: int, num_steps: int) -> float:
    """Warm-up, then a cosine to nothing."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    return PEAK_RATE * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (num_steps - WARMUP_STEPS))) / 2


def rise(done: float, span: tuple[float, float]) -> float:
    """From 0 at the span's start to 1 at its end; done, as both of them, is a share of the steps."""
    start, end = span
    return min(1.0, max(0.0, (done - start) / (end - start)))


def mix_at(done: float) -> Mix:
    """What the rows are made of when this share of the steps is done."""
    is_early = done < RECALL_FIRST_UNTIL
    growth = rise(done, GROWTH)
    return Mix(
        list_growth=growth,
        echo_share=ECHO_SHARE * (1 - growth),
        shares=EARLY_SHARES if is_early else LATE_SHARES,
        repeating_share=EARLY_REPEATING_SHARE if is_early else LATE_REPEATING_SHARE,
    )


def make_optimizer(state: dict[str, Tensor]) -> torch.optim.Optimizer:
    matrices = [tensor for name, tensor in state.items() if tensor.dim() > 1 and "embed" not in name]
    others = [tensor for name, tensor in state.items() if tensor.dim() == 1 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def loss_of(model: TrainingModel, ids_BT: Tensor, is_learned_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the tokens to be learned, and the balance of the experts' work."""
    balance = Balance(total=torch.zeros(()))
    targets_N = is_learned_BT.flatten().nonzero()[:, 0]
    logits = model.logits(ids_BT, targets_N - 1, balance)
    return cross_entropy(logits, ids_BT.flatten()[targets_N]), balance.mean


@torch.no_grad()
def accuracy(model: TrainingModel, task: str, seed: int = 0) -> float:
    """Share of held-out prompts, each alone, whose whole answer is right: all its tokens are the most likely ones."""
    samples = [[turn_of(sample)] for sample in held_out_samples(task, EVALUATED, seed)]
    ids_BT, is_learned_BT = as_batch(samples, EVALUATED_LENGTH)
    targets_N = is_learned_BT.flatten().nonzero()[:, 0]
    right_N = model.logits(ids_BT, targets_N - 1).argmax(-1) == ids_BT.flatten()[targets_N]
    wrong_B = torch.zeros(len(samples)).index_add_(0, targets_N // ids_BT.shape[1], (~right_N).float())
    return (wrong_B == 0).float().mean().item()


class Learner:
    """Gradients of a batch, of which each thread takes an equal part. The result depends on the number of parts."""

    def __init__(self, state: dict[str, Tensor], num_threads: int) -> None:
        self._model = TrainingModel(CONFIG, state)
        self._parameters = list(state.values())
        self._threads = ThreadPoolExecutor(num_threads)
        self._num_parts = num_threads

    def set_gradients(self, ids_BT: Tensor, is_learned_BT: Tensor) -> tuple[float, float]:
        """Of the mean over the parts. Returns loss and balance."""
        parts = zip(ids_BT.chunk(self._num_parts), is_learned_BT.chunk(self._num_parts), strict=True)
        done = list(self._threads.map(lambda part: self._gradients(*part), parts))
        for parameter, *gradients in zip(self._parameters, *(gradients for _, _, gradients in done), strict=True):
            parameter.grad = sum(gradients) / self._num_parts
        return sum(loss for loss, _, _ in done) / self._num_parts, sum(each for _, each, _ in done) / self._num_parts

    def _gradients(self, ids_BT: Tensor, is_learned_BT: Tensor) -> tuple[float, float, tuple[Tensor, ...]]:
        loss, balance = loss_of(self._model, ids_BT, is_learned_BT)
        gradients = torch.autograd.grad(loss + BALANCE_WEIGHT * balance, self._parameters)
        return loss.item(), balance.item(), gradients


def train(state: dict[str, Tensor], num_steps: int, seed: int, out: Path) -> None:
    learner, rows, optimizer = Learner(state, NUM_THREADS), Rows(seed), make_optimizer(state)
    started_s = time.perf_counter()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        done = step / num_steps
        stage = next(stage for stage in STAGES if done < stage.until)
        batch = rows.batch(stage.num_rows, stage.length, mix_at(done))
        loss, balance = learner.set_gradients(*batch)
        torch.nn.utils.clip_grad_norm_(state.values(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_STEPS == 0:
            seconds = time.perf_counter() - started_s
            print(f"step {step + 1}/{num_steps} loss {loss:.4f} balance {balance:.3f} {seconds:.0f} s", flush=True)
        if (step + 1) % SAVE_STEPS == 0:
            report(state)
            write_checkpoint(out, state)


def report(state: dict[str, Tensor]) -> None:
    """With the weights as they are stored."""
    stored = TrainingModel(CONFIG, rounded(state))
    print("held out:", "  ".join(f"{task} {accuracy(stored, task):.1%}" for task in TASKS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Folder of the checkpoint.")
    parser.add_argument("--steps", type=int, default=4800, help="Default: 4800.")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # Parts of a batch run side by side; threads inside an operation would only wait for each other.
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    state = initial_state(CONFIG, arguments.seed)
    print(f"{sum(tensor.numel() for tensor in state.values()):,} parameters")
    train(state, arguments.steps, arguments.seed, arguments.out)
    report(state)
    write_checkpoint(arguments.out, state)
    print(f"wall time {time.perf_counter() - wall_s:.0f} s, CPU time {time.process_time() - cpu_s:.0f} s")


if __name__ == "__main__":
    main()
