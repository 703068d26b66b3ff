"""What a training process on a CPU holds beside its tensors: blocks that were freed and not given back.

glibc keeps what lies between blocks that are still in use. How much that is depends on how blocks of unlike sizes
follow each other, so it is not computed but measured, as three numbers for each way to train: a constant (in which are
tokenizer, loader and the kernels' scratch space), a share of the activations and a share of the logits, whose size
changes from step to step with the number of labels. Fitted and checked by `python -m benchmarks.training_processes`;
see benchmarks/results/training_processes_float32.md and training_processes.md for how well they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from training.rehearsal import Rehearsal


@dataclass(frozen=True)
class LeftBehind:
    """Bytes at a run's peak: constant + activations × their bytes + logits × their bytes."""

    constant: float
    activations: float = 0.0
    logits: float = 0.0

    def of(self, rehearsal: Rehearsal) -> float:
        """Of a run like the rehearsed one."""
        return self.constant + self.activations * rehearsal.activations + self.logits * rehearsal.logits


# Products in float32, (NF4 base?, gradient checkpointing?). Without checkpointing fitted on fifteen cells of three
# tasks; with it the activations hardly count, and the constants rest on two cells each.
FLOAT32: Final = {
    (False, False): LeftBehind(33e6, 0.142, 4.26),
    (True, False): LeftBehind(57e6, 0.353, 5.04),
    (False, True): LeftBehind(294e6, 0.0, 4.26),
    (True, True): LeftBehind(892e6, 0.0, 5.04),
}
# Products in bfloat16, by NF4 base: fitted on twenty cells of two tasks, short runs and long ones.
BFLOAT16: Final = {False: LeftBehind(682e6, 0.353), True: LeftBehind(877e6, 0.376)}


def left_behind(method: str, checkpointing: bool, dtype: torch.dtype) -> LeftBehind:
    """`dtype` is that of the products."""
    return FLOAT32[method == "qlora", checkpointing] if dtype == torch.float32 else BFLOAT16[method == "qlora"]
