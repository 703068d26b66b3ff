"""Does a merged model answer as base + adapters do? Asked of PEFT, which shares no code with our merge.

PEFT applies the adapters unmerged to the base in float32 and continues held-out prompts greedily. Both models then
score the same token sequences, and their logits are compared at every position. Where PEFT's choice and the merged
model's agree at every generated position of a prompt, the merged model left alone would have written the same answer.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from server.merge import MergePart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 32
_ROWS = 8  # prompts continued together

# Ours; short, of several kinds, none of them from a training set.
PROMPTS = (
    "What is the capital of Portugal, and which river does it lie on?",
    "Explain to a child why the sky is blue.",
    "Write a Python function that returns the second largest number of a list.",
    "The parcel came two weeks late and the lid was cracked, but the blue is lovely.",
    "Turn this into a polite e-mail: send me the report by Friday or the deal is off.",
    "Allow a backup job to read objects from one storage bucket and nothing else.",
    "Summarize in one sentence: the operation returns the tags of a resource, page by page, and fails when the "
    "resource was deleted less than an hour ago.",
    "List three uses for an empty glass jar.",
    '{"name": "Ada Lovelace", "born": 1815, "field":',
    "Translate to French: where is the nearest pharmacy?",
    "If a train leaves at 14:10 and the trip takes 95 minutes, when does it arrive?",
    "Continue the story: the lighthouse had been dark for nine years when",
)


@dataclass(frozen=True)
class Limits:
    """What a merged model may differ by."""

    max_logit_delta: float
    mean_kl: float  # nats
    greedy_agreement: float  # smallest share of equal choices


# The sum itself, before any rounding: only the order of additions differs. On SmolLM2-135M a right merge shows a mean
# KL of 2e-11, one whose scale is 2 % off 1e-5.
EXACT = Limits(max_logit_delta=5e-3, mean_kl=1e-7, greedy_agreement=0.99)
# What is saved. Rounding every weight to bfloat16 once more shows 0.43, 2e-4 and 0.992 there.
SAVED = {"float32": EXACT, "bfloat16": Limits(max_logit_delta=4.0, mean_kl=5e-3, greedy_agreement=0.95)}


@dataclass(frozen=True)
class Answers:
    """Token sequences and a model's logits for them."""

    sequences: tuple[tuple[int, ...], ...]
    prompt_lengths: tuple[int, ...]  # tokens
    logits: tuple[Tensor, ...]  # [tokens, vocabulary] each, float32


@dataclass(frozen=True)
class Equivalence:
    """How far the merged model is from base + adapters."""

    prompts: int
    positions: int  # compared by logits: prompts and answers
    max_logit_delta: float
    mean_kl: float  # nats, KL(base + adapters || merged)
    generated_tokens: int  # compared by choice
    equal_tokens: int
    equal_prompts: int  # all of their tokens equal

    @property
    def greedy_agreement(self) -> float:
        """Share of generated tokens for which both models choose the same."""
        return self.equal_tokens / self.generated_tokens

    def failures(self, limits: Limits) -> list[str]:
        """What breaks `limits`, in words; a NaN breaks them too."""
        found = []
        if not self.max_logit_delta <= limits.max_logit_delta:
            found.append(f"max |Δlogit| is {self.max_logit_delta:.3g}, above {limits.max_logit_delta:g}")
        if not self.mean_kl <= limits.mean_kl:
            found.append(f"mean KL is {self.mean_kl:.3g} nats, above {limits.mean_kl:g}")
        if not self.greedy_agreement >= limits.greedy_agreement:
            found.append(f"greedy agreement is {self.greedy_agreement:.1%}, below {limits.greedy_agreement:.0%}")
        return found


def unmerged_answers(
    base: Path,
    parts: Sequence[MergePart],
    prompts: Sequence[str],
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """What PEFT makes of the prompts with the adapters applied unmerged in float32.

    `progress` is told how many prompts are done.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    names = [f"part{index}" for index in range(len(parts))]
    model: Any = PeftModel.from_pretrained(load_float32(base), str(parts[0].directory), adapter_name=names[0])
    for name, part in zip(names[1:], parts[1:], strict=True):
        model.load_adapter(str(part.directory), adapter_name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            for name, part in zip(names, parts, strict=True):
                if name in scaling:
                    scaling[name] *= part.weight
    model.eval()
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    sequences: list[tuple[int, ...]] = []
    logits: list[Tensor] = []
    for start in range(0, len(encoded), _ROWS):
        for sequence in _continue(model, tokenizer, encoded[start : start + _ROWS]):
            sequences.append(sequence)
            logits.append(_score(model, sequence))
            progress(len(sequences))
    answers = Answers(tuple(sequences), tuple(len(prompt) for prompt in encoded), tuple(logits))
    del model
    gc.collect()
    return answers


def compare(model: Any, expected: Answers, progress: Callable[[int], None] = lambda done: None) -> Equivalence:
    """Score `expected`'s sequences with `model`, a transformers model in float32."""
    worst, kl, positions, equal, generated, equal_prompts = 0.0, 0.0, 0, 0, 0, 0
    for index, (sequence, start, reference) in enumerate(
        zip(expected.sequences, expected.prompt_lengths, expected.logits, strict=True)
    ):
        scored = _score(model, sequence)
        delta = (scored - reference).abs().max().item()
        worst = delta if math.isnan(delta) or delta > worst else worst  # once NaN, always NaN
        p, q = (torch.log_softmax(each.double(), -1) for each in (reference, scored))
        kl += (p.exp() * (p - q)).sum(-1).clamp(min=0).sum().item()
        positions += len(sequence)
        # The logits at position t choose token t + 1; the last position's choice is one more.
        same = scored[start - 1 :].argmax(-1) == reference[start - 1 :].argmax(-1)
        equal += int(same.sum())
        generated += same.numel()
        equal_prompts += bool(same.all())
        progress(index + 1)
    return Equivalence(
        prompts=len(expected.sequences),
        positions=positions,
        max_logit_delta=worst,
        mean_kl=kl / positions,
        generated_tokens=generated,
        equal_tokens=equal,
        equal_prompts=equal_prompts,
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt as a user's turn of the base's chat template, or as plain text where the base has none."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return list(tokenizer(prompt, add_special_tokens=False).input_ids)
    return list(tokenizer(prompt).input_ids)


def load_float32(directory: Path) -> Any:
    """The model in `directory`, whatever it is saved in, to compute in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def _continue(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[tuple[int, ...]]:
    """The prompts, each followed by NEW_TOKENS greedy tokens."""
    width = max(len(prompt) for prompt in prompts)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    padded = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=padding,
    )
    return [(*prompt, *row[width:].tolist()) for prompt, row in zip(prompts, output, strict=True)]


@torch.inference_mode()
def _score(model: Any, sequence: Sequence[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([sequence])).logits[0]
    return logits.float()
