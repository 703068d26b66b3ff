"""A model on which every strategy's right answer is known: two linear maps side by side, and tasks that are maps.

    y = Σ over sites (W_site + ΔW_site) x_site        x_site [6], y [5]

A row excites the sites whose part of x is not zero, so tasks on different sites cannot disturb each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from training.continual.contract import Lesson, Outcome, Past, Strategy
from training.continual.factors import Factors, Pair
from training.continual.rules import SiteRule, govern

SITES = ("layers.0.first", "layers.1.second")
IN, OUT, RANK = 6, 5, 3


_LEARNED: dict[Any, list[Any]] = {}


@dataclass(frozen=True)
class Row:
    x: tuple[float, ...]  # [12], both sites
    y: tuple[float, ...]  # [5]

    def as_line(self) -> str:
        return json.dumps([self.x, self.y])


@dataclass(frozen=True, eq=False)
class Toy:
    weights: dict[str, Tensor]
    steps: int = 250
    seed: int = 0

    def matrices(self, modules: Sequence[str]) -> list[tuple[str, Tensor]]:
        return [(module, self.weights[module]) for module in modules]

    def fit(self, lesson: Lesson[Row]) -> dict[str, Pair]:
        generator = torch.Generator().manual_seed(self.seed)
        parameters: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        settles = []
        for site in SITES:
            a = torch.randn(RANK, IN, generator=generator) / IN**0.5
            b = torch.zeros(OUT, RANK)
            if lesson.start is not None:
                old = lesson.start[site]
                a = torch.cat([old.a, a]) if lesson.grow else old.a.clone()
                b = torch.cat([old.b, b], 1) if lesson.grow else old.b.clone()
            one = nn.Parameter(a), nn.Parameter(b)
            rule = lesson.rules.get(site) or (lesson.rule(site, self.weights[site]) if lesson.rule else None)
            settles.append(govern(*one, rule or SiteRule()))
            parameters[site] = one
        optimizer = torch.optim.Adam([p for pair in parameters.values() for p in pair], lr=0.05)
        steps = round(self.steps * lesson.passes)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        x, y = tensors(lesson.examples)
        for _ in range(steps):
            for settle in settles:
                settle()
            loss = (self.run({site: Pair(a, b) for site, (a, b) in parameters.items()}, x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        for settle in settles:
            settle()
        return {site: Pair(a.detach().clone(), b.detach().clone()) for site, (a, b) in parameters.items()}

    def run(self, factors: Factors, x: Tensor) -> Tensor:
        parts = x.split(IN, dim=1)
        return sum(
            (
                part @ (self.weights[site] + factors[site].b @ factors[site].a).T
                for site, part in zip(SITES, parts, strict=True)
            ),
            start=torch.zeros(()),
        )

    def answers(self, factors: Factors, rows: Sequence[Row]) -> list[Row]:
        x, _ = tensors(rows)
        return [Row(row.x, tuple(y)) for row, y in zip(rows, self.run(factors, x).tolist(), strict=True)]

    def losses(self, adapters: Sequence[Factors], rows: Sequence[Row]) -> list[list[float]]:
        x, y = tensors(rows)
        return [(self.run(factors, x) - y).square().mean(dim=1).tolist() for factors in adapters]

    def inputs(self, factors: Factors, groups: Sequence[tuple[float, Sequence[Row] | None]]) -> dict[str, Tensor]:
        found = {site: torch.zeros(IN, IN) for site in SITES}
        for weight, rows in groups:
            if rows:
                for site, part in zip(SITES, tensors(rows)[0].split(IN, dim=1), strict=True):
                    found[site] += weight * part.T @ part / len(rows)
        return found

    def score(self, factors: Factors | None, rows: Sequence[Row]) -> float:
        """1 where every y is met, 0 where it is no better than the base."""
        x, y = tensors(rows)
        none = {site: Pair(torch.zeros(1, IN), torch.zeros(OUT, 1)) for site in SITES}
        base = (self.run(none, x) - y).square().mean()
        return float((1 - (self.run(factors or none, x) - y).square().mean() / base).clamp(min=0))

    def learn(self, strategy: Strategy, tasks: Sequence[Sequence[Row]]) -> list[Outcome[Row]]:
        """Every stage's outcome; learned once for equal arguments."""
        key = (self.seed, self.steps, strategy, tuple(map(tuple, tasks)))
        if key not in _LEARNED:
            _LEARNED[key] = self.learn_anew(strategy, tasks)
        return _LEARNED[key]

    def learn_anew(self, strategy: Strategy, tasks: Sequence[Sequence[Row]]) -> list[Outcome[Row]]:
        outcomes: list[Outcome[Row]] = []
        for stage in range(len(tasks)):
            past = self.past(stage, tasks, outcomes)
            outcomes.append(strategy.finish(past, self.fit(strategy.lesson(past))))
        return outcomes

    def shorter(self) -> Toy:
        """The same, trained for a moment."""
        return replace(self, steps=20)

    def past(self, stage: int, tasks: Sequence[Sequence[Row]], outcomes: Sequence[Outcome[Row]]) -> Past[Row]:
        return Past(
            stage=stage,
            examples=tuple(tasks[stage]),
            outcomes=tuple(outcomes[:stage]),
            earlier=tuple(tuple(task) for task in tasks[:stage]),
            answers=self.answers,
            readable=lambda rows: rows,
            losses=self.losses,
            inputs=self.inputs,
            train=self.fit,
            weights=self.matrices,
            seed=0,
        )


def toy(seed: int = 0) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    return Toy({site: torch.randn(OUT, IN, generator=generator) for site in SITES}, seed=seed)


def tensors(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    return torch.tensor([row.x for row in rows]), torch.tensor([row.y for row in rows])


def task(model: Toy, site: str, change: Tensor, seed: int, count: int = 60) -> tuple[Row, ...]:
    """Rows that excite `site` alone and want (W_site + change) x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(count, 2 * IN)
    begin = SITES.index(site) * IN
    x[:, begin : begin + IN] = torch.randn(count, IN, generator=generator)
    y = x[:, begin : begin + IN] @ (model.weights[site] + change).T
    return tuple(Row(tuple(a), tuple(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True))


def frame(seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal directions of y (columns [5, 5]) and of x (columns [6, 6])."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.linalg.qr(torch.randn(OUT, OUT, generator=generator))[0],
        torch.linalg.qr(torch.randn(IN, IN, generator=generator))[0],
    )
