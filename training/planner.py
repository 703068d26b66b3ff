"""What a run would take: memory, time and money of each method, before anything is downloaded or trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from training.data import read_jsonl
from training.encode import EncodedSet, encode_all
from training.hold_out import hold_out
from training.left_behind import left_behind
from training.recipe import Recipe
from training.rehearsal import Rehearsal, Shape, rehearse

METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Data:
    """What of a data set decides a run's size."""

    examples: int  # trained on; the held-out ones are not counted
    tokens: int  # of one pass
    squared_lengths: int  # sum over the examples
    longest: Shape  # the batch that needs the most memory

    @classmethod
    def of(cls, encoded: EncodedSet, recipe: Recipe) -> Data:
        """The figures of encoded examples under a recipe's batch size."""
        by_length = sorted(encoded.examples, key=lambda example: -len(example.input_ids))
        batch = by_length[: recipe.batch]
        labels = sum(label != -100 for example in batch for label in example.labels)
        lengths = [len(example.input_ids) for example in encoded.examples]
        return cls(
            examples=len(lengths),
            tokens=sum(lengths),
            squared_lengths=sum(length * length for length in lengths),
            longest=Shape(len(batch), len(batch[0].input_ids), max(1, labels)),
        )


def read_data(path: Path, base_directory: Path, recipe: Recipe) -> Data:
    """Encode the file as a run would; raises what `training.encode` and `training.data` raise."""
    from transformers import AutoTokenizer

    from training.finetune import stop_ids
    from training.template import training_template

    tokenizer = AutoTokenizer.from_pretrained(str(base_directory))
    training, _ = hold_out(read_jsonl(path).examples, recipe.hold_out, recipe.seed)
    encoded = encode_all(
        tokenizer, training_template(tokenizer), training, stop_ids(base_directory, tokenizer), recipe.max_length
    )
    return Data.of(encoded, recipe)


@dataclass(frozen=True)
class Machine:
    """Where the run is meant for."""

    name: str  # "this machine", "a100"
    device: str  # "cpu" or "cuda"
    memory: int  # bytes
    overhead: int  # bytes that are not the run's: interpreter and libraries, or the CUDA context
    flops: float  # matrix products per second that training reaches, see `training.machines`
    dtype: torch.dtype
    update: float = 0.0  # seconds in which the optimizer updates one trained parameter, a step

    @property
    def usable(self) -> int:
        """What a run may take: a twelfth is left for the allocator's gaps."""
        return int(self.memory * 11 / 12) - self.overhead


@dataclass(frozen=True)
class Option:
    """One way to train, and what it takes."""

    method: str
    checkpointing: bool
    rehearsal: Rehearsal
    memory: int  # bytes at the peak, the machine's overhead included
    seconds: float
    cost: float | None  # at the price given
    fits: bool


def weigh(base: Path, recipe: Recipe, data: Data, machine: Machine, price_per_hour: float | None) -> list[Option]:
    """Every method with and without gradient checkpointing, on that machine."""
    options = []
    for method in METHODS:
        for checkpointing in (False, True):
            tried = recipe.but(gradient_checkpointing=checkpointing)
            rehearsal = rehearse(base, method, tried, data.longest, machine.device, machine.dtype)
            seconds = seconds_of(rehearsal, data, recipe, method, machine)
            memory = peak_in_process(base, tried, method, rehearsal, machine) + machine.overhead
            options.append(
                Option(
                    method=method,
                    checkpointing=checkpointing,
                    rehearsal=rehearsal,
                    memory=memory,
                    seconds=seconds,
                    cost=None if price_per_hour is None else price_per_hour * seconds / 3600,
                    fits=memory <= machine.usable + machine.overhead,
                )
            )
    return options


# What a process on a CPU grows by once it trains, beside the tensors: kernels made for the shapes, tokenizer, loader.
GROWTH = 80_000_000


def peak_in_process(base: Path, recipe: Recipe, method: str, rehearsal: Rehearsal, machine: Machine) -> int:
    """Bytes by which a run's resident set grows above that of the process before it; on a GPU, bytes of tensors."""
    if machine.device != "cpu":
        return rehearsal.peak
    left = left_behind(method, recipe.gradient_checkpointing, machine.dtype).of(rehearsal)
    return round(rehearsal.peak + mapped_bytes(base, method, rehearsal) + left)


def peak_returned(base: Path, method: str, rehearsal: Rehearsal) -> int:
    """The same where every freed block goes back to the system at once (MALLOC_MMAP_THRESHOLD_=65536): less, slower."""
    return rehearsal.peak + mapped_bytes(base, method, rehearsal) + GROWTH


def mapped_bytes(base: Path, method: str, rehearsal: Rehearsal) -> int:
    """What of an NF4 base's file stays mapped on a CPU.

    Its embedding stays a view of the mapped weights file, whose other pages, once read, count as resident although the
    kernel may drop them.
    """
    if method != "qlora":
        return 0
    file = sum(path.stat().st_size for path in base.glob("*.safetensors")) or 2 * rehearsal.parameters
    return max(0, file - rehearsal.unpacked)


def seconds_of(rehearsal: Rehearsal, data: Data, recipe: Recipe, method: str, machine: Machine) -> float:
    """Of the whole run's optimizer loop: its products, and an update of every trained parameter each step."""
    products = flops_of(rehearsal, data, recipe) / machine.flops * slowed(method, machine)
    steps = recipe.epochs * math.ceil(data.examples / (recipe.batch * recipe.accumulation))
    return products + steps * rehearsal.trained * machine.update


def slowed(method: str, machine: Machine) -> float:
    """How many times longer an operation takes where weights are unpacked for every product.

    On a CPU as measured (in float32 benchmarks/results/training_processes_float32.md, in bfloat16 the 18 cells of
    QLoRA in experiment 5 against LoRA's 12), on a GPU as article 002 gives it.
    """
    if method != "qlora":
        return 1.0
    return 1.39 if machine.device != "cpu" else 1.19 if machine.dtype == torch.float32 else 1.15


def flops_of(rehearsal: Rehearsal, data: Data, recipe: Recipe) -> float:
    """Operations of the whole run: the rehearsed batch scaled to all tokens, attention to the squares of lengths."""
    shape = data.longest
    linear = rehearsal.linear_flops * data.tokens / (shape.rows * shape.length)
    attention = rehearsal.attention_flops * data.squared_lengths / (shape.rows * shape.length**2)
    return (linear + attention) * recipe.epochs
