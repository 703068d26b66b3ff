"""The GPU benchmark's own code, at toy shapes; without a GPU in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import gpu, gpu_engine, gpu_sections, gpu_variants
from benchmarks.gpu_bench import Bench, Report
from server.kernels.gpu import attention, lora, nf4_cuda, selfcheck

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.timeout(300)  # half a minute each on a quiet core
@pytest.mark.parametrize("part", [0, 1, 2], ids=["right", "engine", "rest"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_every_section_runs_or_says_what_it_lacks(
    part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = list(gpu_sections.SECTIONS)
    cuts = [0, every.index("engine"), every.index("peft"), len(every)]
    names = every[cuts[part] : cuts[part + 1]]
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    report = gpu.main(["--tiny", "--sections", *names, *files])
    status = {name: section["status"] for name, section in report["sections"].items()}
    assert list(status) == names
    needing_a_card = {"continuous", "products", "cuts", "profile"}
    assert {name for name, state in status.items() if state == "missing"} <= needing_a_card
    assert all(state != "failed" for state in status.values()), report
    assert all(section["rows"] for name, section in report["sections"].items() if status[name] == "done")
    variants = report["sections"].get("variants", {"rows": []})["rows"]
    assert not [row for row in variants if "failure" in row]
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    page = (tmp_path / "gpu.md").read_text()
    assert "the times mean nothing" in page
    assert ("## continuous: missing (transformers' continuous batching needs a GPU)" in page) is (part == 2)
    capsys.readouterr()


def test_wrong_kernels_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"a kernel that writes nothing": lambda device, dtype, sizes: float("nan")}
    monkeypatch.setattr(selfcheck, "CHECKS", wrong)
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    report = gpu.main(["--tiny", "--sections", "correct", "nf4", *files])
    assert list(report["sections"]) == ["correct"]
    assert report["sections"]["correct"]["why"].startswith("AssertionError: a kernel that writes nothing is off by nan")
    assert "nothing is timed" in capsys.readouterr().out


def test_an_engine_with_wrong_answers_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(bench: Bench) -> Report:
        raise AssertionError("the engine's tokens are not PEFT's")

    broken = gpu_sections.Section(wrong, 10)
    monkeypatch.setitem(gpu_sections.SECTIONS, "answers", broken)
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    report = gpu.main(["--tiny", "--sections", "answers", "engine", "lora", *files])
    sections = report["sections"]
    assert sections["engine"] == {"status": "missing", "why": "the engine's answers were wrong"}
    assert sections["lora"]["status"] == "done"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("asked", "why"),
    [(["answers"], "peft is not installed"), ([], "the section `answers` was not asked for")],
)
def test_figures_of_an_engine_that_was_not_checked_say_so(
    asked: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(bench: Bench) -> Report:
        raise ModuleNotFoundError(name="peft")

    def figures(bench: Bench) -> Report:
        return {"rows": [{"base": "NF4", "step ms": 1.0}, {"base": "bf16", "step ms": 2.0}]}

    monkeypatch.setitem(gpu_sections.SECTIONS, "answers", gpu_sections.Section(lacking, 10))
    monkeypatch.setitem(gpu_sections.SECTIONS, "engine", gpu_sections.Section(figures, 10, engine=True))
    monkeypatch.setitem(gpu_sections.SECTIONS, "steps", gpu_sections.Section(figures, 10))
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    sections = gpu.main(["--tiny", "--sections", *asked, "engine", "steps", *files])["sections"]
    assert [row["answers"] for row in sections["engine"]["rows"]] == [f"not checked: {why}"] * 2
    assert not any("answers" in row for row in sections["steps"]["rows"])
    assert (tmp_path / "gpu.md").read_text().count(f"not checked: {why}") == 2
    capsys.readouterr()


def test_a_different_token_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_engine, "_generated", lambda *_: [1, 2, 3])
    with pytest.raises(AssertionError, match="the engine's tokens are not PEFT's"):
        gpu_engine.answers(Bench("cpu", tiny=True))


def test_a_section_that_fails_is_named_and_the_time_is_bounded() -> None:
    def broken(bench: Bench) -> Report:
        raise RuntimeError("out of memory")

    bench = Bench("cpu", tiny=True)
    assert gpu.run("x", broken, 10, bench, float("inf"))["why"] == "RuntimeError: out of memory"
    late = gpu.run("x", broken, 10, bench, 0.0)
    assert (late["status"], late["why"]) == ("missing", "no time left")

    def lacking(bench: Bench) -> Report:
        import a_package_that_nobody_has  # noqa: F401

        return {}

    assert gpu.run("x", lacking, 10, bench, float("inf"))["why"] == "a_package_that_nobody_has is not installed"


def test_it_refuses_to_time_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--tiny" in capsys.readouterr().err


def test_what_an_earlier_call_found_the_fastest_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Variants whose tokens differed, or that could not be launched, are not; nor those of another base."""
    beside, early = "measured cuts, early", "12 MiB of codes asked for early"

    def row(rows: int, adapters: int, change: str, ms: float, same: float = 1.0, base: str = "NF4") -> Report:
        return {"base": base, "rows": rows, "adapters": adapters, "change": change, "ms": ms, "same tokens": same}

    variants = [
        row(1, 0, "as it is", 0.5),
        row(1, 0, beside, 3.0),
        row(1, 0, f"{beside}, {early}", 2.0),
        row(1, 0, f"{beside}, x by registers", 1.0, same=0.9),
        row(32, 0, beside, 4.0),
        row(32, 0, f"{beside}, {early}", 5.0),
        row(32, 0, f"{beside}, attention: EARLY 1", 3.5),
        row(1, 0, f"{beside}, attention: EARLY 1", 3.5),
        row(32, 32, beside, 6.0),
        row(32, 32, f"{beside}, shrink first", 5.5),
        {"base": "NF4", "rows": 64, "adapters": 0, "change": beside, "failure": "no room"},
        row(8, 0, f"{beside}, {early}", 1.0, base="bf16"),
    ]
    report: Report = {"sections": {"variants": {"rows": variants}}}
    assert gpu_variants.fastest_changes(report) == gpu_variants.Fastest({1: early, 32: ""}, True, False)
    written = tmp_path / "k.json"
    written.write_text(json.dumps(report))
    shape = (28672, 4096, 132, 228 << 10)
    plain = [nf4_cuda.best(rows, *shape, rows > 8) for rows in (1, 8, 64)]
    with gpu_variants.written_changes(written):
        assert lora.SHRINK_FIRST and not attention.EARLY
        found = [nf4_cuda.best(rows, *shape, rows > 8) for rows in (1, 8, 64)]
    assert found[0] is not None and plain[0] is not None
    assert found[0] == plain[0].asking(12 << 20, *shape[:3]) != plain[0]
    assert found[1:] == plain[1:] and not lora.SHRINK_FIRST
    assert early in capsys.readouterr().out
