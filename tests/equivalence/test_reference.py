"""What every other test here rests on: the comparison itself finds a wrong token and a wrong log-probability."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.equivalence.reference import NEW_TOKENS, TOLERANCE, assert_greedy, greedy, load, random_prompt


@pytest.fixture
def model(tmp_path: Path) -> Any:
    write_tiny_llama(tmp_path, seed=random.randrange(2**31), tie_word_embeddings=False)
    return load(tmp_path)


def own(tokens: list[int], rows: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


def test_the_models_answer_passes_and_no_other(model: Any) -> None:
    prompt = random_prompt()
    tokens, rows = greedy(model, prompt, NEW_TOKENS)
    logprobs = own(tokens, rows)
    assert_greedy(tokens, logprobs, model, prompt)
    at = random.randrange(NEW_TOKENS)
    with pytest.raises(AssertionError):
        assert_greedy([*tokens[:at], (tokens[at] + 1) % 256, *tokens[at + 1 :]], logprobs, model, prompt)
    with pytest.raises(AssertionError):
        assert_greedy(tokens[:-1], logprobs[:-1], model, prompt)
    with pytest.raises(AssertionError):
        logprobs[at] += 1.5 * TOLERANCE
        assert_greedy(tokens, logprobs, model, prompt)


def test_of_two_level_tokens_either_is_right(model: Any) -> None:
    """The head gets a second row like the first token's: then that token may come first, and the rest follows it."""
    prompt = random_prompt()
    first = greedy(model, prompt, 1)[0][0]
    twin = (first + 1) % 256
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]
    for token in (first, twin):
        rest, rows = greedy(model, [*prompt, token], NEW_TOKENS - 1)
        beginning = greedy(model, prompt, 1)[1]
        tokens = [token, *rest]
        logprobs = own(tokens, torch.cat([beginning, rows]))
        assert_greedy(tokens, logprobs, model, prompt)
    with pytest.raises(AssertionError):
        assert_greedy([(first + 2) % 256, *tokens[1:]], logprobs, model, prompt)
