"""Numbers beside bounds, percentiles, draws: what the tables are made of."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS, page
from benchmarks.figures import Figure, figures_table, markdown, percentile
from benchmarks.memory import Account, Part, figures, table
from benchmarks.population import Population, Registered, ask, zipf
from benchmarks.registered import p99_ratio, spread
from benchmarks.report import write_json
from benchmarks.resident import Ledger, in_ram, status, tensors_in
from benchmarks.streams import Taken, Turn
from benchmarks.watching import Step, Watch, answered, timed
from benchmarks.workload import write_adapters
from hub.refs import AdapterRef
from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.errors import AdapterUnservable


def test_a_bound_is_kept_or_not() -> None:
    assert [Figure("f", value, least=0.8).met for value in (0.8, 0.79, math.nan)] == [True, False, False]
    assert [Figure("f", value, most=1.3).met for value in (1.3, 1.31, math.nan)] == [True, False, False]
    lines = figures_table([Figure("a", 0.5, least=0.8), Figure("b", 2), Figure("c", 1, most=1.3)]).splitlines()
    assert lines[2:] == ["| a | 0.50 | ≥ 0.8 | no |", "| b | 2.00 | – | – |", "| c | 1.00 | ≤ 1.3 | yes |"]


def test_percentiles_are_by_nearest_rank() -> None:
    values = list(range(1, 201))
    random.shuffle(values)
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 100, 198, 200]
    assert percentile([3, 9, 5], 0.99) == 9


def test_markdown_has_a_cell_a_column() -> None:
    assert markdown(("x", "y"), [("a", "1")]) == "| x | y |\n|---|---:|\n| a | 1 |"


def test_zipf_draws_as_the_law_says() -> None:
    drawn = Counter(zipf(1000, 1.2, 200_000, seed=random.randrange(2**32)))
    assert min(drawn) == 0 and max(drawn) <= 999
    assert drawn[0] / drawn[1] == pytest.approx(2**1.2, rel=0.05)
    assert drawn[0] / drawn[9] == pytest.approx(10**1.2, rel=0.15)
    assert zipf(1000, 1.2, 50, seed=7) == zipf(1000, 1.2, 50, seed=7) != zipf(1000, 1.2, 50, seed=8)


def test_every_registered_adapter_is_another_to_the_engine(tiny_base: Path, tmp_path: Path) -> None:
    files = write_adapters(tiny_base, tmp_path, 2, rank=4)
    many, few = Population(files, 7), Population(files[:1], 3, first=100)
    hub = Registered((many, few))
    digests = [many.digest(n) for n in range(7)] + [few.digest(n) for n in range(3)]
    assert len(set(digests)) == 10
    assert hub.fetch(many.digest(3)).weights == (files[1] / "adapter_model.safetensors").read_bytes()
    assert hub.fetch(few.digest(2)).weights == (files[0] / "adapter_model.safetensors").read_bytes()
    assert [hub.fetch(digest).digest for digest in digests] == digests
    found = hub.resolve(AdapterRef.parse(few.use(2).name))
    assert (found.digest, found.text) == (few.digest(2), few.use(2).version)
    with pytest.raises(IndexError):
        many.digest(7)


def test_decode_steps_are_those_with_one_token_each() -> None:
    watch = Watch()
    for seconds, sequences, tokens in ((9.0, 2, 2), (1.0, 2, 2), (2.0, 2, 17), (3.0, 1, 1), (4.0, 2, 2)):
        watch.step(seconds=seconds, sequences=sequences, adapters=0, tokens=tokens)
    assert watch.decode_steps(2, since=1) == [1.0, 4.0]
    assert watch.steps[2] == Step(2.0, 2, 17)


def test_an_engine_is_timed_on_answers_that_went_well(tiny_base: Path, tmp_path: Path) -> None:
    population = Population(write_adapters(tiny_base, tmp_path, 2), 2)
    watch, limits = Watch(), EngineLimits(kv_memory_bytes=1 << 20, adapter_memory_bytes=1 << 20)
    model = ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1)
    engine = Engine.build(model, limits, population.fetch, watch)
    try:
        assert timed(engine, [[population.use(0)], [population.use(1)], []], 5, prompt_tokens=20) > 0
        request = ask(engine, 0, [population.use(1)], 3)
        answered(engine, request)
        assert watch.first_tokens[request.id] > 0 and watch.first_steps[request.id] <= len(watch.steps)
        assert watch.loads == {"host": 2, "device": 2}
        assert sum(step.tokens for step in watch.steps) == 3 * (20 + 5 - 1) + len(request.prompt) + 3 - 1
        (tmp_path / "adapter-00" / "adapter_model.safetensors").write_bytes(b"spoiled")
        engine.adapters.unload(population.digest(0))
        with pytest.raises(AdapterUnservable):
            timed(engine, [[population.use(0)]], 2)
    finally:
        engine.close()


def test_memory_is_counted_once_and_where_it_lies() -> None:
    size = 32 << 20
    untouched, written = torch.empty(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    before = status("VmRSS")
    ledger = Ledger()
    assert ledger.claim([written, written[:7], written.view(-1)]).resident == size
    assert ledger.claim([written]).bytes == 0
    assert in_ram(untouched.data_ptr(), size) < size // 4
    untouched.fill_(1)
    assert in_ram(untouched.data_ptr(), size) == size
    assert status("VmRSS") - before > size // 2
    assert in_ram(written.data_ptr() + 5, 1000) == 1000


def test_tensors_are_found_inside_objects() -> None:
    class Holder:
        def __init__(self) -> None:
            self.list = [torch.ones(1), {"deep": torch.ones(2)}]
            self.name = "no tensor"

    assert sorted(t.numel() for t in tensors_in(Holder())) == [1, 2]
    assert tensors_in(Holder(), depth=1) == []


def test_the_account_adds_up() -> None:
    mib = 1 << 20
    account = Account(
        parts=(Part("a", None, 3 * mib), Part("b", 4 * mib, 5 * mib)),
        peak_loading=9 * mib,
        peak_serving=10 * mib,
        adapter_computed=100,
        adapter_resident=110.0,
        host_adapter_computed=100,
        host_adapter_grown=130.0,
        kv_token_computed=50,
        kv_token_resident=50.0,
        notes=("a note",),
    )
    assert account.sum_of_parts == 8 * mib
    lines = table(account).splitlines()
    assert (
        "| a | – | 3.0 |" in lines and "| b | 4.0 | 5.0 |" in lines and "| **sum of the parts** |  | **8.0** |" in lines
    )
    assert "| an adapter on the device | 100 | 110 |" in lines and lines[-1] == "* a note"
    assert [figure.value for figure in figures(account, "bf16")] == [1.1, 1.0, 1.25]


def test_streams_are_judged_by_medians() -> None:
    taken = Taken(tokens=100, turns=[Turn(1.0, 0.5, 0.1), Turn(4.0, 0.1, 0.2), Turn(2.0, 0.2, 0.3)])
    assert (taken.rate, taken.step) == (50.0, 0.2)


def test_every_benchmark_of_the_run_is_there_and_names_its_command(tmp_path: Path) -> None:
    root = Path(__file__).parents[2] / "benchmarks"
    for benchmark in BENCHMARKS:
        command = benchmark.command(2, "vllm/python")
        assert f"python -m benchmarks.{benchmark.name}" in (root / f"{benchmark.name}.py").read_text(encoding="utf-8")
        assert ("--vllm" in command) == (benchmark.name == "mix16")
        assert "--vllm" not in benchmark.command(2, None)
    assert (
        page(["-m", "benchmarks.x"], " | t |\n\n", "now", "abc")
        == "`python -m benchmarks.x`, now, commit abc\n\n| t |\n"
    )
    write_json(tmp_path / "f.json", "here", [Figure("f", 1.5, most=1.3)], extra=1)
    read = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert read["figures"] == [{"name": "f", "value": 1.5, "least": None, "most": 1.3, "met": False}]
    assert (read["machine"], read["extra"]) == ("here", 1)


def test_the_spread_of_a_ratio() -> None:
    assert spread(p99_ratio, [1.0] * 50, [2.0] * 50) == (0.5, 0.5)
    low, high = spread(
        p99_ratio, [1.0] * 99 + [9.0], [1.0] * 100
    )  # the slowest of a hundred is drawn twice or more in a quarter
    assert (low, high) == (1.0, 9.0)


def test_the_spread_of_a_median() -> None:
    assert spread(statistics.median, [1.5]) == (1.5, 1.5)
    values = [random.gauss(1, 0.1) for _ in range(400)]
    low, high = spread(statistics.median, values)
    assert low < statistics.median(values) < high
    assert high - low == pytest.approx(4 * 1.2533 * 0.1 / 20, rel=0.6)  # the median's standard error of a normal law
