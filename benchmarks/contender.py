"""What an engine has to offer to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.workload import Case


@dataclass(frozen=True)
class Setup:
    """What every contender is built from."""

    base: Path  # transformers directory
    adapters: tuple[Path, ...]  # PEFT directories
    threads: int
    new_tokens: int  # per prompt


class Contender(Protocol):
    """An engine with the base and every adapter loaded."""

    def run(self, case: Case) -> list[list[int]]:
        """Answer the case's prompts together: `new_tokens` greedy tokens each, end-of-sequence ignored."""
        ...
