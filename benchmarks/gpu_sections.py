"""The sections of benchmarks/gpu.py, in their order: each takes a `Bench` and returns {"rows": [...]}."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import gpu_checks, gpu_engine, gpu_kernels, gpu_peers, gpu_steps, gpu_traffic, gpu_variants
from benchmarks.gpu_bench import Bench, Report


@dataclass(frozen=True)
class Section:
    """`seconds`: its budget; `engine`: whether it means nothing where the engine's answers are wrong."""

    run: Callable[[Bench], Report]
    seconds: float
    engine: bool = False


# What the issue asks for comes first; what explains it, when there is time left.
SECTIONS = {
    "ceilings": Section(gpu_steps.ceilings, 15),
    "correct": Section(gpu_checks.correct, 75),
    "answers": Section(gpu_engine.answers, 90),
    "engine": Section(gpu_engine.nf4_steps, 160, engine=True),
    "prefill": Section(gpu_engine.prefill, 20, engine=True),
    "swap": Section(gpu_traffic.swap, 30, engine=True),
    "registered": Section(gpu_traffic.registered, 60, engine=True),
    "peft": Section(gpu_peers.peft, 45),
    "bitsandbytes": Section(gpu_peers.bitsandbytes_step, 30),
    "dense": Section(gpu_engine.dense_steps, 70, engine=True),
    "continuous": Section(gpu_peers.continuous_batching, 45),
    "cuts": Section(gpu_kernels.nf4_cuts, 60),
    "variants": Section(gpu_variants.variants, 150),
    "profile": Section(gpu_steps.profile, 20),
    "steps": Section(gpu_steps.decode_steps, 60),
    "nf4": Section(gpu_kernels.nf4_products, 30),
    "lora": Section(gpu_kernels.lora, 20),
    "attention": Section(gpu_kernels.attention_kernels, 25),
    "products": Section(gpu_kernels.nf4_bitsandbytes, 20),
    "tilings": Section(gpu_kernels.nf4_tilings, 60),
}
