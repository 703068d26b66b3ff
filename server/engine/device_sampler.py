"""`sampler.sample` on the device that the logits are on: nothing of a vocabulary's size crosses the bus but structures'
masks on their way in, and what was chosen comes back in one small copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.request import TokenLogprobs
from server.engine.sampler import Choice, SamplerState
from server.errors import NonFiniteLogits, StructureFailed

_DRAWN_ROWS = 8  # sorted at a time: a row of 128k tokens takes 6 MB while it is drawn from
_MASKED = "every token that the structure allows here is forbidden by min_new_tokens"


class _Edits(NamedTuple):
    """Changes to single logits: (row, token) and a number each, by what is done with it, in the order of doing."""

    penalized: list[tuple[int, int, float]]
    added: list[tuple[int, int, float]]
    biased: list[tuple[int, int, float]]
    forbidden: list[tuple[int, int, float]]


class DeviceSampler:
    """Chooses tokens as `sampler.sample` does: the same rule, the same draws from the same seeds.

    `meanwhile`, where given, is called in every step between the last launch and the wait for what was chosen, with
    that: tokens [S] int64 on the device. What it launches comes behind the step, and is not waited for.
    """

    def __init__(self, device: str, meanwhile: Callable[[Tensor], None] | None = None) -> None:
        self._device = device
        self._cuda = device.startswith("cuda")
        self._meanwhile = meanwhile

    @torch.inference_mode()
    def __call__(self, logits: Tensor, states: Sequence[SamplerState]) -> list[Choice]:
        """The next token of every row; logits: [S, vocabulary] float32, one state a row, changed in place.

        When it returns, the device has done all that was launched before it was called.
        """
        self._edit(logits, states)
        # A NaN anywhere makes max NaN; +inf shows as inf. Only -inf is legitimate (forbidden tokens).
        healthy = torch.isfinite(logits.amax(-1)) if states else logits.new_zeros(0, dtype=torch.bool)
        refused = self._restrict(logits, states)
        tokens = logits.argmax(-1) if states else logits.new_zeros(0, dtype=torch.int64)
        possible = torch.isfinite(logits.amax(-1)) if states else healthy
        self._draw(logits, states, tokens)
        asked = [row for row, state in enumerate(states) if state.logprobs is not None]
        best = max((states[row].logprobs or 0 for row in asked), default=0)
        parts = [healthy.int(), possible.int(), tokens.int(), *_logprobs(logits, tokens, asked, best)]
        flat = self._fetched(torch.cat([part.reshape(-1) for part in parts]), tokens)
        count = len(states)
        given = _Given(flat[3 * count :], len(asked), best)
        choices = []
        for row, state in enumerate(states):
            if not flat[row]:
                choices.append(
                    Choice(None, None, NonFiniteLogits("the model's output for this request is not a number"))
                )
                continue
            failed = refused.get(row) or (None if flat[count + row] else _MASKED)
            if failed is not None:
                choices.append(Choice(None, None, StructureFailed(failed)))
                continue
            token = int(flat[2 * count + row])
            state.produced.append(token)
            if state.structure is not None:
                state.structure.accept(token)
            logprobs = None if state.logprobs is None else given.of(asked.index(row), token, state.logprobs)
            choices.append(Choice(token, logprobs))
        return choices

    # -- what changes the logits ----------------------------------------------------------------------------------

    def _edit(self, logits: Tensor, states: Sequence[SamplerState]) -> None:
        """Penalties, bias and min_new_tokens of all rows, as `sampler.adjust` has them."""
        edits = _edits(states)
        if not any(edits):
            return
        flat = logits.view(-1)
        width = logits.shape[1]
        counts = [len(kind) for kind in edits]
        places = torch.tensor([row * width + token for row, token, _ in chain(*edits)], dtype=torch.int64)
        numbers = torch.tensor([number for *_, number in chain(*edits)], dtype=torch.float32)
        # One copy: the numbers travel as pairs in the bits of integers.
        sent = self._sent(torch.cat([places, torch.cat([numbers, numbers[: len(numbers) % 2]]).view(torch.int64)]))
        where = torch.split(sent[: len(places)], counts)
        values = torch.split(sent[len(places) :].view(torch.float32)[: len(numbers)], counts)
        if counts[0]:
            old = flat[where[0]]
            flat[where[0]] = torch.where(old > 0, old / values[0], old * values[0])
        for at, value in zip(where[1:3], values[1:3], strict=True):
            if at.numel():
                flat[at] += value
        if counts[3]:
            flat[where[3]] = float("-inf")

    def _restrict(self, logits: Tensor, states: Sequence[SamplerState]) -> dict[int, str]:
        """Set what structures do not allow to -inf; by row, why nothing is allowed."""
        refused, rows, masks = {}, [], []
        for row, state in enumerate(states):
            if state.structure is None:
                continue
            mask = state.structure.allowed()
            if mask is None:
                refused[row] = state.structure.failed or "the structure allows nothing more"
            else:
                rows.append(row)
                masks.append(mask)
        if rows:
            allowed = self._sent(torch.stack(masks))
            for row, mask in zip(rows, allowed, strict=True):
                logits[row].masked_fill_(~mask, float("-inf"))
        return refused

    def _draw(self, logits: Tensor, states: Sequence[SamplerState], tokens: Tensor) -> None:
        """Replace the best token by a drawn one in rows with a temperature."""
        drawn = [(row, state.sampling, state.draws) for row, state in enumerate(states) if state.draws is not None]
        if not drawn:
            return
        settings = [
            [
                float(row),
                sampling.temperature,
                float(sampling.top_k or logits.shape[1]),
                sampling.top_p,
                sampling.min_p,
                draws.random(),
            ]
            for row, sampling, draws in drawn
        ]
        table = self._sent(torch.tensor(settings, dtype=torch.float64))
        for part in torch.split(table, _DRAWN_ROWS):
            rows = part[:, 0].long()
            tokens[rows] = draw(logits[rows], *part[:, 1:].T)

    # -- across the bus -------------------------------------------------------------------------------------------

    def _sent(self, host: Tensor) -> Tensor:
        return host.pin_memory().to(self._device, non_blocking=True) if self._cuda else host

    def _fetched(self, result: Tensor, tokens: Tensor) -> list[int]:
        """The only wait of a step."""
        if not self._cuda:
            if self._meanwhile is not None:
                self._meanwhile(tokens)
            return list(result.tolist())
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        host.copy_(result, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        if self._meanwhile is not None:
            self._meanwhile(tokens)
        done.synchronize()
        return list(host.tolist())


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, point: Tensor) -> Tensor:
    """`sampler.draw` for rows [n, vocabulary], each with its own settings [n] float64 and its own point in [0, 1)."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    shifted = (values.double() - values[:, :1].double()) / temperature[:, None]
    place = torch.arange(logits.shape[1], device=logits.device)
    probabilities = shifted.masked_fill_(place >= top_k[:, None], float("-inf")).softmax(-1)
    keep = probabilities > 0
    before = probabilities.cumsum(-1) - probabilities
    keep &= (before < top_p[:, None]) | (top_p >= 1.0)[:, None]
    keep &= probabilities >= min_p[:, None] * probabilities[:, :1]
    keep[:, 0] = True  # what is kept is always the beginning
    kept = probabilities.masked_fill_(~keep, 0.0)
    kept /= kept.sum(-1, keepdim=True)
    index = (kept.cumsum(-1) <= point[:, None]).sum(-1)
    index = torch.minimum(index, keep.sum(-1) - 1)
    chosen: Tensor = ids.gather(1, index[:, None])[:, 0]
    return chosen


def _edits(states: Sequence[SamplerState]) -> _Edits:
    edits = _Edits([], [], [], [])
    for row, state in enumerate(states):
        if not state.adjusts:
            continue
        sampling = state.sampling
        if sampling.repetition_penalty != 1.0:
            seen = state.prompt.union(state.produced)
            edits.penalized.extend((row, token, sampling.repetition_penalty) for token in seen)
        if sampling.presence_penalty or sampling.frequency_penalty:
            edits.added.extend(
                (row, token, -(sampling.presence_penalty + sampling.frequency_penalty * times))
                for token, times in Counter(state.produced).items()
            )
        edits.biased.extend((row, token, value) for token, value in sampling.logit_bias)
        if len(state.produced) < state.min_new_tokens:
            edits.forbidden.extend((row, token, 0.0) for token in state.forbidden)
    return edits


def _logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[int], best: int) -> list[Tensor]:
    """As int32: the chosen tokens' log-probabilities [n], then the `best` best of each row [n, best], ids before
    values; floats by their bits."""
    if not rows:
        return []
    index = torch.tensor(rows, dtype=torch.int64).to(logits.device, non_blocking=True)
    logprobs = logits[index].log_softmax(-1)
    chosen = logprobs.gather(1, tokens[index][:, None])
    values, ids = logprobs.topk(best, dim=-1) if best else (logprobs[:, :0], logprobs[:, :0])
    return [chosen.view(torch.int32), ids.int(), values.contiguous().view(torch.int32)]


class _Given:
    """The log-probabilities of the rows that asked, out of the flat integers that `_logprobs` made."""

    def __init__(self, flat: list[int], rows: int, best: int) -> None:
        numbers = torch.tensor(flat, dtype=torch.int32)
        floats = numbers.view(torch.float32)
        self._chosen = floats[:rows].tolist()
        self._ids = numbers[rows : rows + rows * best].view(rows, best).tolist()
        self._values = floats[rows + rows * best :].view(rows, best).tolist()

    def of(self, place: int, token: int, best: int) -> TokenLogprobs:
        """What the `place`th of the rows that asked gets."""
        pairs = zip(self._ids[place][:best], self._values[place][:best], strict=True)
        # What is forbidden is not among the best, however few are left.
        return TokenLogprobs(token, self._chosen[place], tuple((i, v) for i, v in pairs if v > float("-inf")))
