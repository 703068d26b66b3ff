"""What the equivalence tests compare with: greedy answers of transformers' generate() over a PEFT model, in float32."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Completion, Engine
from server.engine.request import AdapterUse, Request, Stopping

NEW_TOKENS = 32
TOLERANCE = 1e-4
"""In nats. Sums in another order move log-probabilities of these small models by up to 2e-5."""

_ids = iter(range(10**9))


@dataclass(frozen=True)
class World:
    """A base, adapters for it by the digests that tests call them, and an engine that serves both."""

    base: Path
    adapters: dict[str, Path]
    engine: Engine

    def load(self, kind: str | None) -> Any:
        """PEFT's model of an adapter, or the base itself."""
        return load(self.base, None if kind is None else self.adapters[kind])


def load(base: Path, adapter: Path | None = None) -> Any:
    """The base in float32, with an adapter as PEFT loads it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)


def build(base: Path, fetch: Any, **limits: Any) -> Engine:
    """An engine in float32, whose token budget cuts long prompts into chunks."""
    settings = {"adapter_memory_bytes": 8 << 20, "kv_memory_bytes": 8 << 20, "max_batch_tokens": 96, **limits}
    model = ModelConfig(base=str(base), quantization="none", dtype="float32", threads=1)
    return Engine.build(model, EngineLimits(**settings), fetch)


def ask(prompt: Sequence[int], *uses: str | tuple[str, float]) -> Request:
    """A greedy request of NEW_TOKENS tokens; an adapter without a weight has weight 1."""
    weighted = [(use, 1.0) if isinstance(use, str) else use for use in uses]
    return Request(
        id=str(next(_ids)),
        prompt=tuple(prompt),
        stopping=Stopping(max_new_tokens=NEW_TOKENS, ignore_eos=True),
        adapters=tuple(AdapterUse(digest=kind, version=f"t/{kind}@1", weight=weight) for kind, weight in weighted),
        logprobs=0,
    )


def random_prompt() -> list[int]:
    """Of a length on one side or the other of a page's end."""
    return [random.randrange(256) for _ in range(random.choice([1, 3, 16, 17, 60]))]


def greedy(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
    """generate()'s greedy tokens and the log-probabilities they were chosen from, `(count, vocabulary)`."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).log_softmax(-1)


def own_logprobs(answer: Completion) -> torch.Tensor:
    """The log-probabilities of an answer's own tokens."""
    return torch.tensor([entry.logprob for delta in answer.deltas for entry in delta.logprobs])


def assert_same(got: Completion, model: Any, prompt: Sequence[int], note: str | None = None) -> None:
    """Raise unless `got` is the model's answer: equal tokens, log-probabilities within TOLERANCE.

    Where the model's two best tokens are level within it either is right, and the model goes on from ours.
    """
    try:
        if got.error is not None:
            raise got.error
        assert_greedy(list(got.token_ids), own_logprobs(got), model, prompt)
    except Exception as error:
        error.add_note(f"adapter: {note}")
        raise


def assert_greedy(tokens: list[int], logprobs: torch.Tensor, model: Any, prompt: Sequence[int]) -> None:
    """What `assert_same` says, of NEW_TOKENS tokens and their log-probabilities."""
    assert len(tokens) == NEW_TOKENS
    start = 0
    while start < NEW_TOKENS:
        wanted, rows = greedy(model, [*prompt, *tokens[:start]], NEW_TOKENS - start)
        equal = [one == other for one, other in zip(tokens[start:], wanted, strict=True)]
        first = equal.index(False) if False in equal else None
        if first is not None:
            best, ours = rows[first, wanted[first]].item(), rows[first, tokens[start + first]].item()
            assert best - ours <= TOLERANCE, f"token {start + first}: {tokens[start + first]}, not {wanted[first]}"
        end = NEW_TOKENS if first is None else start + first + 1
        own = torch.tensor(tokens[start:end])[:, None]
        torch.testing.assert_close(
            logprobs[start:end], rows[: end - start].gather(1, own).squeeze(1), rtol=0, atol=TOLERANCE
        )
        start = end


def assert_alike(got: Completion, wanted: Completion) -> None:
    """Raise unless two engines' answers are one: equal tokens up to where the two best ones are level (TOLERANCE)."""
    assert got.error is None
    assert wanted.error is None
    assert len(got.token_ids) == len(wanted.token_ids)
    pairs = zip(got.token_ids, wanted.token_ids, strict=True)
    until = next((at + 1 for at, (one, other) in enumerate(pairs) if one != other), len(wanted.token_ids))
    torch.testing.assert_close(own_logprobs(got)[:until], own_logprobs(wanted)[:until], rtol=0, atol=TOLERANCE)


def write_moved_adapter(base: Path, target: Path, **settings: Any) -> Path:
    """A PEFT directory in which everything that trains was moved by random numbers, biases and norms included."""
    torch.manual_seed(random.randrange(2**31))
    adapted = peft.get_peft_model(load(base), peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += torch.randn_like(parameter) * 0.05 * max(1.0, float(parameter.abs().mean()))
    adapted.save_pretrained(target)
    return target
