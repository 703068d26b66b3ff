"""What was measured beside what was wanted, as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number and the bound it shall keep."""

    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the bound holds; NaN keeps none."""
        above = self.least is None or self.value >= self.least
        return above and (self.most is None or self.value <= self.most)

    @property
    def wanted(self) -> str:
        """The bound in words."""
        bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", self.least), ("≤", self.most)) if bound is not None]
        return " and ".join(bounds)


def figures_table(figures: Sequence[Figure]) -> str:
    """A line a figure: measured, wanted, kept."""
    rows = [
        (f.name, f"{f.value:.2f}", f.wanted or "–", "–" if not f.wanted else "yes" if f.met else "no") for f in figures
    ]
    return markdown(("figure", "measured", "wanted", "kept"), rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank: of fewer than 100 values, the 99th percentile is the largest."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def mebibytes(count: float) -> str:
    """Bytes as MiB with one decimal."""
    return f"{count / 2**20:.1f}"
