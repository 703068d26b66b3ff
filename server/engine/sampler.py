"""From logits to the next token, row by row: a row's draw depends on its own logits and its own seed alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from server.engine.request import Sampling, TokenLogprobs
from server.engine.structure import StructureState
from server.errors import NonFiniteLogits, ServerError, StructureFailed


@dataclass
class SamplerState:
    """What sampling one answer needs to remember."""

    sampling: Sampling
    logprobs: int | None
    prompt: frozenset[int]
    forbidden: tuple[int, ...]  # token ids that may not come before min_new_tokens
    min_new_tokens: int
    produced: list[int] = field(default_factory=list)
    draws: np.random.Generator | None = None  # one number in [0, 1) a token; None: the best token is taken
    structure: StructureState | None = None

    @classmethod
    def begin(
        cls,
        sampling: Sampling,
        logprobs: int | None,
        prompt: Sequence[int],
        stop_ids: frozenset[int],
        min_new_tokens: int,
        structure: StructureState | None = None,
    ) -> SamplerState:
        """State before the first token; the random draws come from `sampling.seed` alone."""
        # All 64 bits are the key of a counter-based generator; torch's own would keep 32 of them.
        draws = np.random.Generator(np.random.Philox(key=sampling.seed % 2**64)) if sampling.temperature > 0 else None
        forbidden = tuple(sorted(stop_ids))
        return cls(sampling, logprobs, frozenset(prompt), forbidden, min_new_tokens, [], draws, structure)

    @property
    def adjusts(self) -> bool:
        """Whether this row's logits must be changed before the choice."""
        s = self.sampling
        return bool(
            s.repetition_penalty != 1.0
            or s.presence_penalty
            or s.frequency_penalty
            or s.logit_bias
            or (self.forbidden and len(self.produced) < self.min_new_tokens)
        )


@dataclass(frozen=True)
class Choice:
    """One row's next token; `token_id` None means that there is none, for the reason that `error` gives."""

    token_id: int | None
    logprobs: TokenLogprobs | None
    error: ServerError | None = None


Choose = Callable[[Tensor, Sequence[SamplerState]], list[Choice]]
"""Chooses the next token of every row, as `sample` does."""


@torch.inference_mode()  # the runner's logits were made in it, and may be changed in place only in it
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Choice]:
    """Choose the next token of every row; logits: [S, vocabulary] float32, one state a row, changed in place."""
    for row, state in enumerate(states):
        if state.adjusts:
            adjust(logits[row], state)
    best, ids = logits.max(-1)
    # A NaN anywhere makes max NaN; +inf shows as inf. Only -inf is legitimate (forbidden tokens).
    healthy = torch.isfinite(best).tolist()
    greedy = ids.tolist()
    choices = []
    for row, state in enumerate(states):
        if not healthy[row]:
            error = NonFiniteLogits("the model's output for this request is not a number")
            choices.append(Choice(None, None, error))
            continue
        if state.structure is not None:
            failed = state.structure.restrict(logits[row])
            if failed is not None:
                choices.append(Choice(None, None, StructureFailed(failed)))
                continue
            greedy[row] = int(logits[row].argmax())
        token = greedy[row] if state.draws is None else draw(logits[row], state.sampling, state.draws.random())
        state.produced.append(token)
        if state.structure is not None:
            state.structure.accept(token)
        choices.append(Choice(token, None if state.logprobs is None else _logprobs(logits[row], token, state.logprobs)))
    return choices


def adjust(logits: Tensor, state: SamplerState) -> None:
    """Apply penalties, bias and min_new_tokens to one row [vocabulary] in place."""
    sampling = state.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(state.prompt.union(state.produced)))
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if (sampling.presence_penalty or sampling.frequency_penalty) and state.produced:
        counts = Counter(state.produced)
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        logits[torch.tensor(list(counts))] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.logit_bias:
        ids, values_ = zip(*sampling.logit_bias, strict=True)
        logits[torch.tensor(ids)] += torch.tensor(values_, dtype=torch.float32)
    if state.forbidden and len(state.produced) < state.min_new_tokens:
        logits[torch.tensor(state.forbidden)] = float("-inf")


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, token ids), best first, after temperature, top_k, top_p and min_p; probabilities sum to 1.

    top_p keeps the smallest set whose probability reaches top_p; min_p drops what is below min_p times the best.
    """
    # Shifted before the division: a tiny temperature must sharpen, not overflow.
    shifted = (logits.double() - logits.max()) / sampling.temperature
    values, ids = shifted.sort(descending=True, stable=True)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    probabilities = values.softmax(-1)
    keep = probabilities > 0  # what is forbidden must not be drawn even where the sum is rounded below 1
    if sampling.top_p < 1.0:
        keep &= probabilities.cumsum(-1) - probabilities < sampling.top_p
    if sampling.min_p > 0.0:
        keep &= probabilities >= sampling.min_p * probabilities[0]
    keep[0] = True
    probabilities, ids = probabilities[keep], ids[keep]
    return probabilities / probabilities.sum(), ids


def draw(logits: Tensor, sampling: Sampling, point: float) -> int:
    """One token of one row [vocabulary], by inverting the cumulative distribution at `point` in [0, 1)."""
    probabilities, ids = distribution(logits, sampling)
    index = int(torch.searchsorted(probabilities.cumsum(-1), point, right=True))
    return int(ids[min(index, ids.numel() - 1)])


def _logprobs(logits: Tensor, token: int, best: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(best) if best else (logprobs[:0], logprobs[:0])
    # What is forbidden is not among the best, however few are left.
    top = tuple((int(i), value) for i, value in zip(ids, values.tolist(), strict=True) if value > float("-inf"))
    return TokenLogprobs(token, float(logprobs[token]), top)
