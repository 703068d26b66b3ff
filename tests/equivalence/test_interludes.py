"""An answer is the same whether its step rested for newcomers, or its prompt was computed at such a rest."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.outbox import BlockingOutbox
from server.engine.request import Delta
from server.kernels import native
from tests.conftest import write_byte_tokenizer, write_tiny_llama
from tests.equivalence.kinds import write_kinds
from tests.equivalence.reference import ask, assert_greedy, build, load, random_prompt

pytestmark = [
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(native.load(torch.float32) is None, reason="without a C compiler no step rests"),
]


@pytest.mark.timeout(180)  # half a minute where others compute too
@pytest.mark.parametrize("flood", ["plain", "dora", "lora-both"])
def test_newcomers_of_every_kind_beside_a_flood_equal_peft(
    flood: str, tmp_path: Path, directory_fetch: Callable[[dict[str, Path]], Any]
) -> None:
    base = tmp_path / "base"
    write_tiny_llama(base, seed=random.randrange(2**31), num_hidden_layers=4, max_position_embeddings=2048)
    write_byte_tokenizer(base)
    adapters = write_kinds(base, tmp_path, biased=False)
    engine = build(base, directory_fetch(adapters), max_sequences=4, kv_memory_bytes=64 << 20, max_batch_tokens=700)
    engine.generate([ask([1, 2], kind) for kind in adapters])  # all on the device
    newcomers = list(adapters)
    random.shuffle(newcomers)
    sent: list[tuple[str, list[int], BlockingOutbox]] = []
    at_rest, loop = engine._loop._at_rest, engine._loop
    loop._interludes._saved = 1e9  # a slow machine shall not send them into the line
    computed = []

    def send(kind: str, prompt: list[int]) -> None:
        outbox = BlockingOutbox()
        engine.submit(ask(prompt, kind), outbox)
        sent.append((kind, prompt, outbox))

    def one_comes() -> None:
        if newcomers and threading.current_thread() is engine._thread:
            send(newcomers.pop(), random_prompt())
        running = set(map(id, engine._scheduler.running))
        at_rest()
        computed.extend(s.request.adapters[0].digest for s in engine._scheduler.running if id(s) not in running)

    loop._at_rest = one_comes  # type: ignore[method-assign]
    try:
        for number in range(10):
            # Long ones attend by torch's blocks between the layers.
            send(flood, random_prompt() if number % 4 else [random.randrange(256) for _ in range(600)])
        at = 0
        while at < len(sent) or newcomers:
            kind, prompt, outbox = sent[at]
            deltas: list[Delta] = list(outbox)
            if deltas[-1].error is not None:
                raise deltas[-1].error
            own = torch.tensor([entry.logprob for delta in deltas for entry in delta.logprobs])
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert_greedy(tokens, own, load(base, adapters[kind]), prompt)
            at += 1
    finally:
        engine.close()
    assert len(set(computed)) > 2, "next to nobody was computed at a rest"
    engine.check_integrity()
