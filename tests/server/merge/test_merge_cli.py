"""`hub merge` as a person runs it, on a tiny base and a hub of its own."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hub.errors import AdapterNotFound, BaseNotFound, TargetNotEmpty
from hub.hub import Hub
from server.errors import BaseMismatch
from server.merge_cli import merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
]

Trained = Callable[..., Path]


@pytest.fixture(autouse=True)
def libraries_as_before() -> Iterator[None]:
    """The verb quietens transformers for the whole process; other tests want it as it was."""
    from transformers.utils import logging as transformers_logging

    level, bitsandbytes = transformers_logging.get_verbosity(), logging.getLogger("bitsandbytes").level
    with warnings.catch_warnings():
        yield
    transformers_logging.set_verbosity(level)
    transformers_logging.enable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(bitsandbytes)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.open(f"file://{tmp_path}/hub") as hub:
        yield hub


def run(tmp_path: Path, *arguments: str) -> Result:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n\n  what is this  \n", encoding="utf-8")
    return CliRunner().invoke(
        merge, [*arguments, "--hub", f"file://{tmp_path}/hub", "--prompts", str(prompts), "--threads", "1"]
    )


def test_a_merge_reports_and_can_be_loaded(hub: Hub, biased_base: Path, trained: Trained, tmp_path: Path) -> None:
    pushed = hub.push(trained("adapter"), "team/x:prod", base=str(biased_base)).version

    result = run(tmp_path, "team/x:prod", "--out", f"{tmp_path}/merged", "--base", str(biased_base))

    assert result.exit_code == 0, result.output
    assert "biased + team/x@1: 6 modules changed" in result.output
    assert "2 prompts" in result.output
    assert f"hub serve --base {tmp_path}/merged" in result.output
    report = json.loads((tmp_path / "merged" / "merge-report.json").read_text(encoding="utf-8"))
    assert report["adapters"] == [{"version": "team/x@1", "digest": pushed.digest, "weight": 1.0}]
    assert report["base"]["fingerprint"].startswith("sha256:")
    whole = hub.push(tmp_path / "merged", "team/merged", base=str(biased_base), parents=["team/x@1"]).version
    assert whole.manifest.kind == "model" and whole.manifest.parents == (pushed.digest,)


def test_json_is_the_report(hub: Hub, biased_base: Path, trained: Trained, tmp_path: Path) -> None:
    hub.push(trained("a"), "team/a", base=str(biased_base))
    hub.push(trained("b"), "team/b", base=str(biased_base))
    weights = ["--weight", "0.5", "--weight", "-2"]

    result = run(tmp_path, "team/a", "team/b", *weights, "--out", f"{tmp_path}/m", "--base", str(biased_base), "--json")

    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [(part["version"], part["weight"]) for part in printed["adapters"]] == [("team/a@1", 0.5), ("team/b@1", -2)]
    assert printed["equivalent"] is True
    assert printed["exact"]["prompts"] == 2


def test_another_base_is_refused(
    hub: Hub, biased_base: Path, tiny_base: Path, trained: Trained, tmp_path: Path
) -> None:
    hub.push(trained("adapter"), "team/x", base=str(biased_base))

    result = run(tmp_path, "team/x", "--out", f"{tmp_path}/merged", "--base", str(tiny_base))

    assert isinstance(result.exception, BaseMismatch)
    assert "team/x@1 was made for" in str(result.exception)
    assert not (tmp_path / "merged").exists()


def test_what_corrects_the_base_in_nf4_is_refused(
    hub: Hub, biased_base: Path, trained: Trained, tmp_path: Path
) -> None:
    from hub.facts import Facts

    for init in ("random", "qera"):
        adapter = trained(init)
        Facts(recipe={"method": "qlora", "init": init}).write(adapter)
        hub.push(adapter, f"team/{init}", base=str(biased_base))
    plain, corrects = (
        run(tmp_path, f"team/{init}", "--out", f"{tmp_path}/{init}-merged", "--base", str(biased_base))
        for init in ("random", "qera")
    )
    assert plain.exit_code == 0, plain.output
    assert isinstance(corrects.exception, BaseMismatch) and "init qera" in str(corrects.exception)
    assert not (tmp_path / "qera-merged").exists()


def test_a_base_known_only_by_name_is_asked_for(hub: Hub, biased_base: Path, trained: Trained, tmp_path: Path) -> None:
    hub.push(trained("adapter"), "team/x", base=str(biased_base))

    result = run(tmp_path, "team/x", "--out", f"{tmp_path}/merged")

    assert isinstance(result.exception, BaseNotFound)
    assert str(result.exception) == "team/x@1 was made for the base 'biased': say where it lies with --base"


def test_what_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    result = run(tmp_path, "team/nobody", "--out", f"{tmp_path}/merged")

    assert isinstance(result.exception, AdapterNotFound)


def test_a_taken_directory_is_refused(hub: Hub, tmp_path: Path) -> None:
    result = run(tmp_path, "team/nobody", "--out", str(tmp_path))

    assert isinstance(result.exception, TargetNotEmpty)


def test_weights_go_with_adapters_or_not_at_all(hub: Hub, tmp_path: Path) -> None:
    result = run(tmp_path, "team/x", "--weight", "1", "--weight", "2", "--out", f"{tmp_path}/merged")

    assert result.exit_code == 2
    assert "1 adapters and 2 weights" in result.output


def test_an_empty_prompt_file_is_wrong_usage(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")

    result = CliRunner().invoke(merge, ["team/x", "--out", f"{tmp_path}/merged", "--prompts", str(empty)])

    assert result.exit_code == 2
    assert "holds no prompt" in result.output
