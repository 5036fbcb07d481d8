"""What int8 and int4 experts cost in exactness: of one expert, of the logits, and of the demo model's answers.

``python tests/bench/expert_error.py [--prompts N]``
"""

from __future__ import annotations

import argparse

import torch

from cluster.checkpoints.demo_model import demo_checkpoint
from cluster.checkpoints.demo_tasks import TASKS, held_out_samples
from cluster.front.chat import ChatMessage, turn_end_ids
from cluster.front.chat_encoder import chat_encoder
from cluster.front.tokenizer import Tokenizer
from experts.checkpoint import Checkpoint
from experts.dispatch import LocalDispatcher
from experts.expert_dtype import QuantizedDtype
from experts.placement import ShardId, Slot
from experts.shard import Shard
from experts.weights import load_slots
from router.batch import SequenceSlice, build_batch
from router.config import ModelConfig
from router.engine_builder import build_engine
from router.kv_cache import KvCache, KvCacheSpec
from router.messages import EngineSettings, GenerateRequest, Start
from router.model import Llama4Model
from router.sampling_params import SamplingParams
from router.weights import load_router

KINDS: tuple[QuantizedDtype | None, ...] = (None, "int8", "int4")
MAX_MODEL_LEN = 256
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="Of each task.")
    num_prompts = parser.parse_args().prompts
    folder = demo_checkpoint()
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_checkpoint_config(checkpoint.config, checkpoint.generation_config)
    tokenizer = Tokenizer(folder)
    asked = {task: held_out_samples(task, num_prompts, seed=2026) for task in TASKS}
    prompts = {
        task: [chat_encoder(tokenizer, None)([ChatMessage.of_text("user", each.prompt)]) for each in samples]
        for task, samples in asked.items()
    }
    some = [prompt for of_task in prompts.values() for prompt in of_task[:4]]
    plain_y, plain_logits = outputs(checkpoint, config, None, some)
    for kind in KINDS:
        y_RD, logits_LV = outputs(checkpoint, config, kind, some)
        print(f"{kind or 'float32'}: an expert {error(y_RD, plain_y):.2%}, logits {error(logits_LV, plain_logits):.2%}")
        texts = answers(str(folder), kind, [each for of_task in prompts.values() for each in of_task], tokenizer)
        wanted = [sample.answer for samples in asked.values() for sample in samples]
        right = [text == answer for text, answer in zip(texts, wanted, strict=True)]
        rates = [sum(right[start : start + num_prompts]) / num_prompts for start in range(0, len(right), num_prompts)]
        print("   right:", ", ".join(f"{task} {rate:.1%}" for task, rate in zip(asked, rates, strict=True)))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def outputs(
    checkpoint: Checkpoint, config: ModelConfig, kind: QuantizedDtype | None, prompts: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one expert for normal rows, and the logits of the last position of each prompt."""
    slots = [Slot(layer, expert) for layer in config.moe_layers for expert in range(config.num_local_experts)]
    experts = load_slots(checkpoint, slots, config.expert_shape, dtype=torch.float32, device=CPU, quantized=kind)
    shard = Shard(shard_id=ShardId("here"), slots=experts, hidden_size=config.hidden_size, dtype=torch.float32)
    x_RD = torch.randn(64, config.hidden_size, generator=torch.Generator().manual_seed(0))
    y_RD = shard.apply_expert(slots[0], x_RD)
    model = Llama4Model(config, load_router(checkpoint, config, dtype=torch.float32, device=CPU))
    spec = KvCacheSpec(config=config, dtype=torch.float32, block_size=config.block_size_for(None))
    num_blocks = MAX_MODEL_LEN // spec.block_size
    total = num_blocks * len(prompts) + 1
    kv = KvCache(spec, num_global_blocks=total, num_local_blocks=total, device=CPU)
    tables = [list(range(1 + index * num_blocks, 1 + (index + 1) * num_blocks)) for index in range(len(prompts))]
    slices = [
        SequenceSlice(token_ids=ids, start=0, global_blocks=table, local_blocks=table, logits_from=len(ids) - 1)
        for ids, table in zip(prompts, tables, strict=True)
    ]
    batch = build_batch(slices, config, spec.block_size, CPU)
    return y_RD, model.forward(batch, kv, LocalDispatcher(shard)).logits_LV


def answers(folder: str, kind: QuantizedDtype | None, prompts: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    """Greedy, in the order of the prompts."""
    settings = EngineSettings(
        model=folder, dtype="float32", max_model_len=MAX_MODEL_LEN, expert_dtype=kind or "auto", num_threads=1
    )
    start = Start(router_id="error", settings=settings, secret=b"", weights_version=0, epoch=None)
    engine = build_engine(start).engine
    params = SamplingParams(temperature=0.0, max_tokens=16, stop_token_ids=turn_end_ids(tokenizer))
    for index, prompt_ids in enumerate(prompts):
        engine.add(GenerateRequest(request_id=str(index), prompt_ids=prompt_ids, params=params))
    token_ids: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            token_ids[int(output.request_id)] += output.token_ids
    detokenizers = [tokenizer.detokenizer() for _ in prompts]
    return [each.push(ids) + each.finish() for each, ids in zip(detokenizers, token_ids, strict=True)]


if __name__ == "__main__":
    main()
