"""Pages run out: somebody waits, and the answer is the one he would have got undisturbed."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.request import Request, Sampling
from server.errors import RequestTooLarge
from tests.server.engine.pretend import PAGE_TOKENS, Counts, PretendEngine, Reader, expected, request


def random_request(rng: random.Random) -> Request:
    sampling = rng.choice(
        [
            Sampling(),
            Sampling(temperature=1.0, seed=rng.randrange(100)),
            Sampling(
                temperature=0.8,
                top_p=0.9,
                seed=rng.randrange(100),
                repetition_penalty=1.3,
                presence_penalty=0.5,
                frequency_penalty=0.5,
            ),
        ]
    )
    prompt = [rng.randrange(40) for _ in range(rng.randrange(1, 20))]
    adapters = rng.sample(["a", "b", "c"], rng.randrange(3))
    return request(
        *adapters, prompt=prompt, new=rng.randrange(1, 40), sampling=sampling, tenant=rng.choice("xy"), logprobs=1
    )


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_answers_are_those_of_an_undisturbed_engine(prefix_cache: bool) -> None:
    rng = random.Random()
    pretend = PretendEngine(pages=16, prefix_cache=prefix_cache)  # two of the larger requests fill it
    try:
        asked = [random_request(rng) for _ in range(40)]
        readers = pretend.run(*asked)
        assert pretend.counts.preemptions > 5
        for one, reader in zip(asked, readers, strict=True):
            assert reader.error is None
            assert reader.token_ids == expected(one)
            assert [lp.token_id for delta in reader.deltas for lp in delta.logprobs] == reader.token_ids
            finish = reader.deltas[-1].finish
            assert finish is not None
            assert finish.usage.completion_tokens == len(reader.token_ids)
        pretend.check_empty()
    finally:
        pretend.close()


def test_pages_are_taken_as_the_answer_grows() -> None:
    pretend = PretendEngine(pages=32)
    try:
        reader = pretend.submit(request(prompt=[1] * 5, new=100))
        pretend.step()
        assert pretend.engine._pages.used == 2
        for _ in range(7):
            pretend.step()
        assert pretend.engine._pages.used == 3
        other = pretend.submit(request(prompt=[2] * 5, new=100))  # reserving in full, these two would not fit
        pretend.step()
        assert len(pretend.scheduler.running) == 2
        pretend.finish(reader, other)
    finally:
        pretend.close()


def test_the_youngest_gives_way_and_comes_back_before_later_ones() -> None:
    pretend = PretendEngine(pages=8, prefix_cache=False)
    try:
        first = request(prompt=[1] * 9, new=20)
        second = request(prompt=[2] * 9, new=20)
        third = request(prompt=[3] * 9, new=20)
        readers = [pretend.submit(one) for one in (first, second, third)]
        while not pretend.counts.preemptions:
            pretend.step()
        assert [s.request.id for s in pretend.scheduler.running] == [first.id]
        assert [s.request.id for s in pretend.scheduler.waiting] == [second.id, third.id]
        shown = len(readers[1].token_ids)
        assert shown > 0
        pretend.finish(*readers)
        order = pretend.counts.step_of_first_token
        assert order[second.id] < order[third.id]
        assert [r.token_ids for r in readers] == [expected(one) for one in (first, second, third)]
        pretend.check_empty()
    finally:
        pretend.close()


def test_what_can_never_fit_is_refused_at_once() -> None:
    pretend = PretendEngine(pages=8)
    try:
        with pytest.raises(RequestTooLarge):
            pretend.submit(request(prompt=[1] * 5, new=8 * PAGE_TOKENS - 4))
        asked = request(prompt=[1] * 5, new=8 * PAGE_TOKENS - 5)  # every page there is
        [reader] = pretend.run(asked)
        assert reader.token_ids == expected(asked)
    finally:
        pretend.close()


def test_a_cancelled_one_that_was_preempted_leaves_nothing() -> None:
    pretend = PretendEngine(pages=8)
    try:
        readers: list[Reader] = []
        asked = [request("a", prompt=[i] * 9, new=20) for i in range(3)]
        readers = [pretend.submit(one) for one in asked]
        while not pretend.counts.preemptions:
            pretend.step()
        for one in asked:
            pretend.engine.cancel(one.id)
        pretend.step()
        assert all(reader.ended for reader in readers)
        pretend.check_empty()
    finally:
        pretend.close()


def test_the_real_model_goes_on_as_if_nothing_had_been(
    tiny_base: Path, make_adapter: Any, tmp_path: Path, directory_fetch: Callable[..., Any]
) -> None:
    """Greedy and seeded answers of a tiny Llama in fp32: with room for all, and with pages for two or three."""
    from server.model.attention import PagedKv

    adapters = {f"a{i}": make_adapter(tiny_base, tmp_path / f"a{i}", seed=i) for i in range(2)}
    rng = random.Random()
    asked = [
        request(
            *([f"a{i % 3}"] if i % 3 < 2 else []),
            prompt=[rng.randrange(256) for _ in range(rng.randrange(3, 40))],
            new=rng.randrange(20, 60),
            sampling=Sampling(temperature=0.9, seed=i) if i % 2 else Sampling(),
            logprobs=2,
        )
        for i in range(12)
    ]

    def answers(pages: int, prefix_cache: bool) -> tuple[list[Any], int]:
        page = PagedKv.page_bytes(2, 2, 16, 16, __import__("torch").float32)
        limits = EngineLimits(
            kv_memory_bytes=pages * page, adapter_memory_bytes=1 << 20, prefix_cache=prefix_cache, max_batch_tokens=64
        )
        model = ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1)
        counts = Counts()
        engine = Engine.build(model, limits, directory_fetch(adapters), counts)
        try:
            copies = [Request(**{**one.__dict__, "id": f"{one.id}-{pages}-{prefix_cache}"}) for one in asked]
            return engine.generate(copies), counts.preemptions
        finally:
            engine.close()
            engine.check_integrity()

    undisturbed, none = answers(400, False)
    assert not none
    for prefix_cache in (True, False):
        disturbed, preempted = answers(8, prefix_cache)
        assert preempted
        for one, other in zip(undisturbed, disturbed, strict=True):
            assert other.error is None
            assert other.token_ids == one.token_ids
            assert other.text == one.text
            mine = [lp.logprob for delta in one.deltas for lp in delta.logprobs]
            theirs = [lp.logprob for delta in other.deltas for lp in delta.logprobs]
            assert theirs == pytest.approx(mine, abs=1e-4)
