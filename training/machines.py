"""Machines a run can be planned for: this one, measured, or a GPU by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from server.engine.machine_memory import whole_memory
from training.planner import Machine
from training.trainable import attention_for, dtype_of

# Name → (memory in GB, dense bfloat16 (t4: float16) TFLOP/s, GB/s of its memory), by its maker.
GPUS: dict[str, tuple[int, float, int]] = {
    "t4": (16, 65.0, 320),
    "l4": (24, 121.0, 300),
    "rtx-4090": (24, 165.0, 1008),
    "a100-40": (40, 312.0, 1555),
    "a100": (80, 312.0, 2039),
    "h100": (80, 989.0, 3350),
    "h200": (141, 989.0, 4800),
}
GPU_SHARE = 0.35  # of the maker's figure that training of a few billion parameters reaches; an assumption
GPU_BANDWIDTH_SHARE = 0.8  # of the maker's figure that the optimizer's update reaches; an assumption
UPDATE_BYTES = 32  # of a parameter: gradient twice (its norm, the update), weight and two moments read and written
# Of a layer's speed, see `layer_speed`, that the products of a whole training run reach; chosen on six runs of
# SmolLM2-135M in bfloat16 on one thread, see benchmarks/results/training_advice.md.
CPU_SHARE = 0.82
_CUDA_CONTEXT = 600_000_000
_PROCESS = 660_000_000  # Python with torch, transformers, peft and trl imported; measured


def gpu(name: str, memory: int | None = None) -> Machine:
    """The GPU of that name, with `memory` bytes instead of its own where given."""
    gigabytes, tflops, bandwidth = GPUS[name]
    return Machine(
        name=name,
        device="cuda",
        memory=memory or gigabytes * 10**9,
        overhead=_CUDA_CONTEXT,
        flops=tflops * 1e12 * GPU_SHARE,
        dtype=torch.bfloat16,
        update=UPDATE_BYTES / (bandwidth * 1e9 * GPU_BANDWIDTH_SHARE),
    )


def this_machine(base: Path, memory: int | None = None, precision: str = "auto") -> Machine:
    """The CPU at hand: its memory, and its speed at training a layer of the base (two seconds' measurement).

    `precision` is a recipe's.
    """
    dtype = dtype_of(precision, "cpu")
    flops = layer_speed(base, dtype) * CPU_SHARE
    return Machine("this machine's CPU", "cpu", memory or whole_memory(), _PROCESS, flops, dtype, update_seconds())


def layer_speed(
    base: Path, dtype: torch.dtype, seconds: float = 1.5, clock: Callable[[], float] | None = None
) -> float:
    """Operations a second of one layer of the base with frozen random weights, forward and backward, at its best.

    `clock` is by default the processor's time where one thread computes, so that what other processes take meanwhile
    does not count, else the wall's.

    A layer rather than a matrix product: what is no product takes a share of the time that differs between machines,
    and is largest where products are fastest. 4 rows of 128 tokens. The base's files are not read but its config.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(str(base))
    config.get_text_config().update({"num_hidden_layers": 1, "vocab_size": 256, "pad_token_id": None})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_for("cpu", 128))
    model.requires_grad_(False).train()
    hidden = model.get_input_embeddings().weight.shape[1]
    given = torch.randn(4, 128, hidden).to(dtype).requires_grad_()

    def step() -> None:
        model(inputs_embeds=given, use_cache=False).logits.sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    operations: int = counter.get_total_flops()
    return operations / _shortest(step, seconds, clock)


def update_seconds(
    parameters: int = 16_000_000, seconds: float = 0.5, clock: Callable[[], float] | None = None
) -> float:
    """For one float32 parameter, in one step: its gradient made and clipped, its value updated by AdamW."""
    held = torch.zeros(parameters, requires_grad=True)
    optimizer = torch.optim.AdamW([held], fused=True)

    def step() -> None:
        held.grad = torch.ones(parameters)  # a new one every step
        torch.nn.utils.clip_grad_norm_([held], 1.0)
        optimizer.step()

    step()  # which makes the moments
    return _shortest(step, seconds, clock) / parameters


def _shortest(step: Callable[[], object], seconds: float, clock: Callable[[], float] | None) -> float:
    if clock is None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best, until = math.inf, time.monotonic() + seconds
    while time.monotonic() < until or best == math.inf:
        started = clock()
        step()
        best = min(best, clock() - started)
    return best
