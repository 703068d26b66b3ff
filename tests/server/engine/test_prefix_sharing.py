"""Pages shared between requests: only the same content, never the last token's page, never a poisoned one."""

import random
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from server.engine.batch import StepBatch
from server.engine.kv_cache import PageTable
from server.engine.prefix import extend_keys, root_key
from server.engine.request import AdapterUse, Request
from server.errors import NonFiniteLogits
from tests.server.engine.pretend import PAGE_TOKENS, PretendEngine, expected, request


@pytest.fixture
def pretend() -> Iterator[PretendEngine]:
    pretend = PretendEngine()
    yield pretend
    pretend.close()
    pretend.check_empty()


def prompt(tokens: int) -> tuple[int, ...]:
    return tuple(random.randrange(40) for _ in range(tokens))


def answered(pretend: PretendEngine, asked: Request) -> int:
    """Runs `asked` alone, checks its answer, and returns how many tokens were found in the cache."""
    before = pretend.counts.hit_tokens
    [reader] = pretend.run(asked)
    assert reader.token_ids == expected(asked)
    return pretend.counts.hit_tokens - before


def test_the_same_beginning_is_computed_once(pretend: PretendEngine) -> None:
    beginning = prompt(5 * PAGE_TOKENS)
    assert answered(pretend, request("a", prompt=beginning + prompt(3), new=1)) == 0
    computed = pretend.counts.computed
    assert answered(pretend, request("a", prompt=beginning + prompt(3), new=1)) == 5 * PAGE_TOKENS
    assert pretend.counts.computed - computed == 3
    assert pretend.engine.snapshot().prefix_hit_tokens == 5 * PAGE_TOKENS
    assert pretend.engine.snapshot().kv_pages_cached > 0


@pytest.mark.parametrize("tokens", [1, PAGE_TOKENS, PAGE_TOKENS + 1, 3 * PAGE_TOKENS])
def test_the_last_prompt_token_is_always_computed(pretend: PretendEngine, tokens: int) -> None:
    asked = prompt(tokens)
    answered(pretend, request(prompt=asked, new=6))
    assert answered(pretend, request(prompt=asked, new=6)) == (tokens - 1) // PAGE_TOKENS * PAGE_TOKENS


def test_an_answer_is_found_by_the_next_turn(pretend: PretendEngine) -> None:
    first = request("a", prompt=prompt(6), new=3 * PAGE_TOKENS)
    [reader] = pretend.run(first)
    conversation = (*first.prompt, *reader.token_ids)
    hit = answered(pretend, request("a", prompt=(*conversation, *prompt(2))))
    assert hit == (len(conversation) - 1) // PAGE_TOKENS * PAGE_TOKENS  # the last token was never computed


def test_other_adapters_or_weights_share_nothing(pretend: PretendEngine) -> None:
    asked = prompt(4 * PAGE_TOKENS)
    others: list[tuple[str | tuple[str, float], ...]] = [
        (),
        ("a",),
        ("b",),
        (("a", 0.5),),
        (("a", -0.5),),
        ("a", "b"),
        ("a", ("b", 0.5)),
    ]
    for adapters in others:
        assert answered(pretend, request(*adapters, prompt=asked)) == 0, adapters


def test_the_order_of_adapters_and_those_of_weight_zero_do_not_count(pretend: PretendEngine) -> None:
    asked = prompt(2 * PAGE_TOKENS + 1)
    answered(pretend, request("a", ("b", 0.5), prompt=asked))
    assert answered(pretend, request(("b", 0.5), ("c", 0.0), ("d", -0.0), "a", prompt=asked)) == 2 * PAGE_TOKENS


def test_two_versions_of_a_name_are_two_things() -> None:
    """A moved alias changes the digest, and nothing but the digest counts."""
    old = root_key([AdapterUse("sha256:old", "t/a@1")])
    assert root_key([AdapterUse("sha256:new", "t/a@1")]) != old
    assert root_key([AdapterUse("sha256:old", "t/renamed@7")]) == old
    assert root_key([AdapterUse("x", ""), AdapterUse("y", "")]) != root_key([AdapterUse("xy", "")])


def test_a_page_is_known_by_all_before_it() -> None:
    one: list[bytes] = []
    two: list[bytes] = []
    extend_keys(one, root_key([]), [1, 2, 3, 4, 9, 9], 2, 3)
    extend_keys(two, root_key([]), [1, 2, 4, 3, 9, 9], 2, 3)
    assert one[0] == two[0]
    assert one[1:] != two[1:]
    assert one[2] != two[2]


def test_running_together_sharers_keep_their_pages_apart(pretend: PretendEngine) -> None:
    beginning = prompt(3 * PAGE_TOKENS)
    answered(pretend, request("a", prompt=beginning))
    asked = [request("a", prompt=beginning + prompt(random.randrange(1, 9)), new=12) for _ in range(12)]
    readers = pretend.run(*asked)
    assert [r.token_ids for r in readers] == [expected(one) for one in asked]
    assert pretend.counts.hit_tokens == 12 * 3 * PAGE_TOKENS


def test_cached_pages_make_room_least_recently_used_first(pretend: PretendEngine) -> None:
    old, recent = prompt(20 * PAGE_TOKENS), prompt(20 * PAGE_TOKENS)
    answered(pretend, request(prompt=old, new=1))
    answered(pretend, request(prompt=recent, new=1))
    answered(pretend, request(prompt=prompt(30 * PAGE_TOKENS), new=1))  # 64 pages in all: 6 to 7 must go
    assert answered(pretend, request(prompt=recent, new=1)) == 19 * PAGE_TOKENS
    kept = answered(pretend, request(prompt=old, new=1))
    assert 0 < kept < 19 * PAGE_TOKENS  # of the old one, the end went and the beginning is still worth something


def test_poisoned_pages_are_never_found_and_leave_nothing(pretend: PretendEngine) -> None:
    asked = prompt(10 * PAGE_TOKENS)
    for _ in range(2):
        [reader] = pretend.run(request(PretendEngine.POISON, prompt=asked))
        assert isinstance(reader.error, NonFiniteLogits)
        assert pretend.counts.hit_tokens == 0
    assert pretend.engine._pages.cached == 0
    assert all(content == content for content in pretend.memory.values())
    assert answered(pretend, request("a", prompt=asked)) == 0


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("end", ["cancel", "failed step", "preemption"])
def test_who_leaves_before_a_token_is_chosen_leaves_no_poison(
    cache: bool, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a prompt was computed, and nobody has seen what came of it."""
    pretend = PretendEngine(max_batch_tokens=2 * PAGE_TOKENS + 1, prefix_cache=cache)
    try:
        pretend.run(request(PretendEngine.POISON, prompt=(1,), new=1))  # it is on the device
        asked = request(PretendEngine.POISON, prompt=prompt(6 * PAGE_TOKENS))
        reader = pretend.submit(asked)
        run = pretend.engine._computing._run

        def fail(batch: StepBatch, between: Callable[[], None] | None = None) -> Tensor:
            run(batch, between)
            raise RuntimeError("the step failed")

        if end == "failed step":
            monkeypatch.setattr(pretend.engine._computing, "_run", fail)
        pretend.step()
        assert any(content != content for content in pretend.memory.values()) != reader.ended
        if end == "cancel":
            pretend.engine.cancel(asked.id)
            pretend.step()
        elif end == "preemption":
            pretend.scheduler._preempt(pretend.scheduler.running[0])
        assert reader.ended == (end != "preemption")
        assert all(content == content for content in pretend.memory.values())
    finally:
        pretend.close()


def test_a_finite_answer_over_a_poisoned_page_is_not_shared_either(pretend: PretendEngine) -> None:
    """An infinite key can hide behind a weight of zero: logits are fine, the page is not."""
    asked = request("a", prompt=prompt(6 * PAGE_TOKENS), new=4)
    pretend.engine._computing.runner.kv.finite = lambda pages: [i != 2 for i in range(len(pages))]  # type: ignore[method-assign]
    scrubbed: list[int] = []
    pretend.engine._computing.runner.kv.scrub = scrubbed.extend  # type: ignore[method-assign]
    [reader] = pretend.run(asked)
    assert reader.token_ids == expected(asked)
    assert pretend.engine._pages.cached == 2
    assert len(scrubbed) >= 4


def test_without_the_cache_nothing_is_kept() -> None:
    pretend = PretendEngine(prefix_cache=False)
    try:
        asked = prompt(5 * PAGE_TOKENS)
        assert answered(pretend, request(prompt=asked)) == 0
        assert answered(pretend, request(prompt=asked)) == 0
        assert pretend.engine._pages.cached == 0
        pretend.check_empty()
    finally:
        pretend.close()


def test_the_page_table_against_a_plain_model() -> None:
    """Random operations; a model with sets says what must be true."""
    rng = random.Random()
    table = PageTable(12, 1)
    owned: list[list[int]] = []
    content: dict[int, bytes] = {}
    for _ in range(3000):
        action = rng.random()
        if action < 0.4:
            free, count = table.free, rng.randrange(1, 5)
            pages = table.allocate(count)
            assert (pages is None) == (count > free)
            if pages is not None:
                assert not set(pages) & {page for mine in owned for page in mine}
                for page in pages:
                    content[page] = rng.randbytes(1)[:1] * 8
                owned.append(pages)
        elif action < 0.6 and owned:
            for page in rng.choice(owned):
                table.publish(page, content[page])
        elif action < 0.8:
            keys = [rng.choice(list(content.values()) or [b"x"]) for _ in range(rng.randrange(1, 4))]
            pages = table.share(keys)
            assert [content[page] for page in pages] == keys[: len(pages)]
            if pages:
                owned.append(pages)
        elif owned:
            table.release(owned.pop(rng.randrange(len(owned))))
        table.check_integrity(page for mine in owned for page in mine)


def test_the_memory_tells_poisoned_pages() -> None:
    import torch

    from server.model.attention import PagedKv

    kv = PagedKv(2, 2, 4, 5, 3, torch.float16, "cpu")
    for cache in (*kv.k, *kv.v):
        cache.normal_().mul_(1000)
    kv.k[0].fill_(65504.0)  # the largest float16: its sum is none
    kv.v[1][1, 2 * 3 + 1, 3] = float("nan")
    kv.k[1][0, 4 * 3, 0] = float("-inf")
    assert kv.finite([0, 1, 2, 3, 4]) == [True, True, False, True, False]
    assert kv.finite([4, 3]) == [False, True]
    kv.scrub([2, 4])
    assert kv.finite([2, 4, 0]) == [True, True, True]
    assert bool(kv.k[0].all(-1)[0, 0])
