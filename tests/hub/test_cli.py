from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hub import cli
from hub.commands import COMMANDS, Command
from hub.hub import Hub
from tests.hub.making import lora_tensors, write_adapter, write_base

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the `hub` command in this process; its exit status, stdout and stderr."""

    def main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hub", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, captured.out, captured.err

    return main


@pytest.fixture
def data(run: Run) -> Callable[..., Any]:
    """Run a verb with --json, which must succeed; what it printed."""

    def parsed(*arguments: str) -> Any:
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, "")
        return json.loads(out)

    return parsed


def adapter(tmp_path: Path, seed: int) -> str:
    return str(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)))


def test_the_story_of_two_versions(tmp_path: Path, run: Run) -> None:
    base = str(write_base(tmp_path / "tiny"))
    status, out, err = run("push", adapter(tmp_path, 1), "team/x", "--base", base, "--alias", "prod")
    assert (status, err) == (0, "")
    assert "pushed team/x@1" in out
    assert "rank 4, alpha 8, 4 modules (q_proj, v_proj)" in out
    assert "aliases  :latest :prod" in out
    status, out, err = run("push", adapter(tmp_path, 2), "team/x", "--parent", "team/x@1")
    assert "warning: the base (tiny-base) is unverified" in err
    assert "team/x@2 is this content already" in run("push", adapter(tmp_path, 2), "team/x")[1]
    listed = run("list")[1]
    assert "team/x@2" in listed
    assert "team/x@1" not in listed
    assert "team/x@1" in run("list", "team/*", "--all")[1]
    assert "parents  team/x@1\n" in run("show", "team/x")[1]
    assert run("tag", "team/x@2", ":prod", "--expect", "1") == (0, "team/x:prod is now team/x@2\n", "")
    assert run("untag", "team/x", "prod")[1] == "team/x:prod is gone; it was team/x@2\n"
    assert "team/x:prod was @2" in run("log", "team/x")[1]
    assert run("verify")[1] == "2 versions checked, all sound\n"
    status, out, _ = run("pull", "team/x@1", str(tmp_path / "out"))
    assert (status, out.startswith("pulled team/x@1 into")) == (0, True)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_json_of_every_verb(tmp_path: Path, data: Callable[..., Any]) -> None:
    pushed = data("push", adapter(tmp_path, 1), "x")
    assert (pushed["version"], pushed["created_now"], pushed["aliases"]) == ("x@1", True, ["latest"])
    assert data("show", "x")["digest"] == pushed["digest"]
    assert [version["version"] for version in data("list")] == ["x@1"]
    assert data("tag", "x", "prod")["alias"] == "prod"
    assert data("untag", "x", "prod")["alias"] == "prod"
    assert [event["kind"] for event in data("log")] == ["push", "tag", "tag", "untag"]
    assert [event["seq"] for event in data("log", "x", "--since", "2")] == [3, 4]
    assert data("verify") == []
    assert data("pull", "x", str(tmp_path / "out"))["directory"] == str(tmp_path / "out")


def test_refusals_are_one_line_with_the_reason(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    run("push", adapter(tmp_path, 3), "nobody/x")
    refusals = {
        ("show", "y"): "ADAPTER_NOT_FOUND",
        ("show", "../x"): "REF_INVALID",
        ("push", str(tmp_path / "empty"), "x"): "ADAPTER_FILE_MISSING",
        ("push", adapter(tmp_path, 1), "x", "--base", "nope"): "BASE_NOT_FOUND",
        ("list", "--hub", "s3://bucket"): "HUB_UNAVAILABLE",
        ("list", "--hub", f"file://{tmp_path}/hub#1"): "HUB_UNAVAILABLE",
        ("list", "--base", "\udcff"): "QUERY_INVALID",
        ("pull", "nobody/x", "/"): "TARGET_NOT_EMPTY",
        ("signatures", "nobody/x", "--out", "/dev/null/sub"): "HUB_UNAVAILABLE",
        ("export", "nobody/x", "/dev/null/sub.bundle"): "HUB_UNAVAILABLE",
        ("export", "nobody/x", str(tmp_path / ("n" * 256))): "HUB_UNAVAILABLE",
    }
    for arguments, reason in refusals.items():
        status, out, err = run(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert err.endswith(f" ({reason})\n")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["push"], ["push", "/nonexistent", "x"], ["tag", "x", "y", "--expect", "-1"], ["--nope"]]
)
def test_wrong_usage_exits_2(run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Error: " in err


def test_an_unknown_verb_is_answered_with_the_nearest(run: Run) -> None:
    status, _, err = run("pus")
    assert status == 2
    assert "Did you mean push" in err


def test_what_strangers_wrote_cannot_steer_the_terminal(tmp_path: Path, run: Run) -> None:
    directory = adapter(tmp_path, 1)
    evil = "\x1b[2J\x9b31m\u202e\r[bold]x"
    (Path(directory) / "loraplex.json").write_text(json.dumps({"recipe": {evil: evil}, "base": {"name": "[red]b"}}))
    run("push", directory, "x")
    for arguments in (["show", "x"], ["show", "x", "--json"], ["list"], ["list", "--json"]):
        status, out, _ = run(*arguments)
        assert status == 0
        assert not {"\x1b", "\x9b", "\u202e", "\r"} & set(out)
    assert "[red]b" in run("list")[1]
    assert "[bold]x" in run("show", "x")[1]


def test_verify_tells_damage_and_exits_1(tmp_path: Path, run: Run) -> None:
    run("push", adapter(tmp_path, 1), "x")
    digest = json.loads(run("show", "x", "--json")[1])["manifest"]["files"]["adapter_config.json"]["sha256"][7:]
    stored = tmp_path / "default-hub" / "blobs" / "sha256" / digest[:2] / digest
    stored.chmod(0o644)
    stored.write_bytes(b"{}")
    status, out, _ = run("verify")
    assert status == 1
    assert "BLOB_CORRUPT" in out
    status, out, _ = run("verify", "x", "--json")
    assert (status, json.loads(out)[0]["file"]) == (1, "adapter_config.json")


def test_a_fault_of_ours_keeps_its_trace(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("push", adapter(tmp_path, 1), "x")
    monkeypatch.setattr("hub.hub.Hub.search", lambda *arguments: b"\xff".decode())
    monkeypatch.setattr(sys, "argv", ["hub", "list"])
    with pytest.raises(UnicodeDecodeError):
        cli.main()


def test_what_the_machine_refuses_safetensors_is_said_as_any_other_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its errors, of a full disk too, are no OSError and have the number in their text alone."""
    name = "n" * 300
    monkeypatch.setattr("hub.hub.Hub.search", lambda *arguments: save_file({"x": np.zeros(1)}, tmp_path / name))
    monkeypatch.setattr(sys, "argv", ["hub", "list"])
    with Hub.open(str(tmp_path / "default-hub")):
        pass
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == "error: this machine refused: File name too long (SYSTEM_REFUSED)\n"
    name = "gone/x"  # a fault of ours
    with pytest.raises(SafetensorError, match="os error 2"):
        cli.main()


@pytest.mark.parametrize(
    ("code", "named", "said"),
    [
        (errno.EACCES, "/data/x\x1b[31m", r"error: this machine refused /data/x\x1b[31m: Permission denied"),
        (errno.ENOTDIR, Path("a.txt/x"), "error: this machine refused a.txt/x: Not a directory"),
        (errno.ELOOP, b"loop", "error: this machine refused loop: Too many levels of symbolic links"),
        (errno.EMFILE, 7, "error: this machine refused: Too many open files"),
    ],
)
def test_what_the_machine_refuses_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    named: Any,
    said: str,
) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code), named)

    monkeypatch.setattr("hub.hub.Hub.search", refused)
    monkeypatch.setattr(sys, "argv", ["hub", "list"])
    with Hub.open(str(tmp_path / "default-hub")):
        pass
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == f"{said} (SYSTEM_REFUSED)\n"


def test_the_story_of_upkeep(tmp_path: Path, run: Run, data: Callable[..., Any]) -> None:
    for seed, f1 in ((1, 0.7), (2, 0.8), (3, 0.9)):
        directory = Path(adapter(tmp_path, seed))
        (directory / "loraplex.json").write_text(json.dumps({"metrics": {"f1": f1}}))
        (directory / "README.md").write_text(f"# Card {seed}\n\x1b[2J")
        run("push", str(directory), "x", *(["--parent", f"x@{seed - 1}"] if seed > 1 else []))
    assert [found["version"] for found in data("search", "--metric", "f1>0.75")] == ["x@2", "x@3"]
    assert [found["version"] for found in data("list", "--metric", "f1>0.75")] == ["x@3"]
    assert data("tag", "prod", "x@2=90", "x@3=10")["targets"][1]["weight"] == 10
    assert "prod (10 %)" in run("show", "x")[1]
    assert run("tag", "prod", "x@1=1")[1] == "x:prod is now @1\n"
    assert run("rollback", "x:prod")[1] == "x:prod is now @2 90 %, @3 10 %\n"
    assert "x:prod @1 -> @2 90 %, @3 10 %  (rollback)" in run("log", "x:prod")[1]
    status, _, err = run("rm", "x@2")
    assert (status, "held by :prod" in err, "VERSION_HELD" in err) == (1, True, True)
    (tmp_path / "gate.toml").write_text("require = ['f1 > 0.85']")
    status, _, err = run("promote", "x@2", "prod", "--gate", str(tmp_path / "gate.toml"))
    assert (status, "f1 0.8 > 0.85" in err) == (1, True)
    assert data("promote", "x@3", "prod", "--gate", str(tmp_path / "gate.toml"))["passed"] == ["f1 0.9 > 0.85"]
    assert data("pin", "x@2", "--holder", "audit")["expires"] is None
    assert run("rm", "x@2")[0] == 1
    assert data("unpin", "x@2", "--holder", "audit")["left"] == []
    assert run("rm", "x@2")[0] == 0
    assert run("restore", "x@2")[1] == "x@2 is back\n"
    run("rm", "x@2")
    assert data("gc", "--dry-run", "--retention", "0", "--grace", "0")["purged"] == ["x@2"]
    assert "x@2 went for good" in run("gc", "--retention", "0", "--grace", "0")[1]
    assert run("fsck") == (0, "catalog, journal and blobs fit together\n", "")
    assert data("fsck", "--rebuild") == []
    assert [step["version"] for step in data("show", "x@3", "--lineage")["lineage"]["ancestors"]] == [None]
    assert data("show", "x@3", "--config")["config"]["r"] == 4
    assert run("show", "x@3", "--card")[1] == "# Card 3\n\\x1b[2J\n"
    found = data("diff", "x@1", "x@3")
    assert (found["metrics"], len(found["tensors"])) == ({"f1": [0.7, 0.9]}, 8)
    assert "scaling*B*A" in run("diff", "x@1", "x@3")[1]
    assert run("watch", "--since", "0", "--count", "2")[1].count("\n") == 2
    assert json.loads(run("watch", "x:prod", "--since", "0", "--count", "1", "--json")[1])["alias"] == "prod"


def test_pages_of_a_list_say_that_there_is_more(tmp_path: Path, run: Run) -> None:
    for seed in (1, 2, 3):
        run("push", adapter(tmp_path, seed), "x")
    _, out, err = run("list", "--all", "--limit", "2", "--json")
    assert [found["version"] for found in json.loads(out)] == ["x@1", "x@2"]
    assert err == "there are more: --after x@2\n"
    assert [found["version"] for found in json.loads(run("list", "--all", "--after", "x@2", "--json")[1])] == ["x@3"]


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["search"], ["show", "x"], ["pull", "x"], ["log"], ["verify"], ["fsck"], ["fsck", "--rebuild"], ["gc"],
     ["tag", "x@1", "prod"], ["rm", "x@1"], ["diff", "x@1", "x@2"], ["watch"], ["rollback", "x:prod"]],
)  # fmt: skip
def test_no_verb_but_push_makes_a_hub(tmp_path: Path, run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert str(tmp_path / "default-hub") in err
    assert err.endswith("(HUB_NOT_FOUND)\n")
    assert not (tmp_path / "default-hub").exists()


@pytest.mark.parametrize(
    "arguments",
    [["tag", "prod", "x@1=x"], ["tag", "x@1", "a", "b"], ["tag", "x@1"], ["untag", "x@1", "latest"], ["log", "x@1"],
     ["watch", "x@1"], ["pin", "x@1", "--for", "0s"], ["gc", "--retention", "7"], ["gc", "--grace", "-1s"],
     ["rollback", "x@1"], ["list", "--after", "x"], ["list", "--limit", "0"], ["watch", "--count", "0"]],
)  # fmt: skip
def test_wrong_usage_of_the_upkeep_verbs_exits_2(tmp_path: Path, run: Run, arguments: list[str]) -> None:
    run("push", adapter(tmp_path, 1), "x")
    assert run(*arguments)[0] == 2


def test_an_event_number_beyond_what_a_database_holds_is_simply_in_the_future(tmp_path: Path, run: Run) -> None:
    run("push", adapter(tmp_path, 1), "x")
    assert run("log", "--since", str(2**80))[:2] == (0, "no events\n")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_verb_has_help_with_examples(run: Run, command: Command) -> None:
    status, out, _ = run(command.name, "--help")
    assert status == 0
    assert f"hub {command.name}" in out.partition("Examples:")[2]
    # A server prints one line for whoever started it; a group's own verbs have the option.
    assert "--json" in out or command.name in ("registry", "token", "key")
    assert "--hub" in out or command.name in ("login", "token", "key")  # login names it, as its argument


def test_a_package_that_cannot_be_imported_does_not_take_the_others_away(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_tables", lambda: {"hub": COMMANDS, "broken": ()})
    monkeypatch.delitem(vars(cli.group), "_table", raising=False)
    try:
        status, out, err = run("--help")
        assert (status, "push" in out) == (0, True)
        assert err == "warning: the verbs of the package 'broken' cannot be loaded here\n"
    finally:
        vars(cli.group).pop("_table", None)


def test_help_imports_nothing_heavy() -> None:
    """What keeps `hub --help` under 150 ms: measured by what is imported, whatever the machine's load."""
    program = (
        "import sys; sys.argv = ['hub', '--help']\n"
        "from hub.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'sqlalchemy', 'alembic', 'psycopg', 'numpy', 'rich', 'torch', 'transformers', 'grpc',"
        " 'huggingface_hub', 'platformdirs'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "Versions:" in done.stdout


def test_the_hub_works_without_torch() -> None:
    program = (
        "import sys\n"
        "import hub.hub, hub.base, hub.lora_config, hub.cli_push, hub.cli_show, hub.cli_tags, hub.cli_verify\n"
        "import hub.diff, hub.rebuild\n"
        "print(sorted({'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"


def test_what_a_push_states_can_be_searched_for(tmp_path: Path, run: Run, data: Callable[..., Any]) -> None:
    reviews = tmp_path / "reviews.jsonl"
    reviews.write_text("{}\n")
    stated = ("--dataset", str(reviews), "--metrics", "f1=0.83", "--metrics", "sentiment.accuracy=0.9")
    assert run("push", adapter(tmp_path, 1), "team/x", *stated)[0] == 0
    run("push", adapter(tmp_path, 2), "team/y")
    assert [found["version"] for found in data("search", "--metric", "f1>0.8")] == ["team/x@1"]
    shown = run("show", "team/x")[1]
    assert "sentiment.accuracy" in shown
    assert "reviews.jsonl" in shown
    status, _, err = run("push", adapter(tmp_path, 3), "team/z", "--metrics", "f1=much")
    assert (status, "the metric f1 is no number: 'much'" in err) == (1, True)


def test_a_hub_that_one_may_not_look_into_is_told_without_its_paths(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", adapter(tmp_path, 1), "x")
    exists = Path.exists

    def closed(path: Path, **named: bool) -> bool:
        if path.name == "FORMAT":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path, **named)

    monkeypatch.setattr(Path, "exists", closed)
    for arguments in (["list"], ["fsck"], ["pull", "x", str(tmp_path / "out")]):
        assert run(*arguments) == (1, "", "error: the hub cannot be opened: Permission denied (HUB_UNAVAILABLE)\n")


def test_a_comparison_without_room_for_the_weights_says_so(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", adapter(tmp_path, 1), "x")
    run("push", adapter(tmp_path, 2), "x")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hub.diff.copy_checked", full)
    status, out, err = run("diff", "x@1", "x@2")
    assert (status, out) == (1, "")
    assert err.startswith("error: the weights of x@1 cannot be laid out to compare them: No space left on device")


def test_an_export_onto_a_full_disk_names_the_file_that_was_asked_for(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", adapter(tmp_path, 1), "x")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hub.pull._write_files", full)
    target = tmp_path / "x.bundle"
    wanted = f"error: {target} cannot be written: No space left on device (HUB_UNAVAILABLE)\n"
    assert run("export", "x", str(target)) == (1, "", wanted)


def test_a_usage_error_of_tag_names_what_is_missing(run: Run) -> None:
    assert "give REF and ALIAS, or ALIAS and one or more REF=WEIGHT" in run("tag", "team/x@1")[2]


def test_the_end_of_a_split_alias_tells_all_that_it_held(tmp_path: Path, run: Run) -> None:
    run("push", adapter(tmp_path, 1), "x")
    run("push", adapter(tmp_path, 2), "x")
    run("tag", "canary", "x@1=50", "x@2=50")
    assert run("untag", "x", "canary")[1] == "x:canary is gone; it was x@1 50 %, @2 50 %\n"


def test_a_pin_for_a_time_tells_its_end(tmp_path: Path, run: Run) -> None:
    run("push", adapter(tmp_path, 1), "x")
    assert run("pin", "x", "--holder", "anna")[1] == "x@1 is pinned by anna\n"
    out = run("pin", "x", "--holder", "anna", "--for", "1d")[1]
    assert re.fullmatch(r"x@1 is pinned by anna until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", out)


def test_only_damage_is_said_to_be_mended_by_a_push(tmp_path: Path, run: Run) -> None:
    run("push", adapter(tmp_path, 1), "x")
    assert run("key", "generate", str(tmp_path / "k.pem"))[0] == 0
    status, out, err = run("verify", "--require-signature", "--trust", str(tmp_path / "k.pem.pub"))
    assert (status, "SIGNATURE_MISSING" in out, err) == (1, True, "")
    next((tmp_path / "default-hub" / "blobs").rglob("sha256/??/*")).unlink()
    assert "again mends" in run("verify")[2]


def test_the_log_and_the_watch_of_what_never_was_are_refused(tmp_path: Path, run: Run) -> None:
    run("push", adapter(tmp_path, 1), "x")
    run("tag", "x", "was")
    run("untag", "x", "was")
    assert "x:was was @1" in run("log", "x:was")[1]
    assert run("log", "x:was", "--since", "99")[:2] == (0, "no events\n")
    assert run("log", "x:nope") == (1, "", "error: x never had an alias 'nope' (ALIAS_NOT_FOUND)\n")
    for verb in ("log", "watch"):
        status, _, err = run(verb, "typo")
        assert (status, err.endswith("(ADAPTER_NOT_FOUND)\n")) == (1, True)


def test_a_key_of_which_one_half_is_there_is_not_made(tmp_path: Path, run: Run) -> None:
    for there, other in (("k.pem", "k.pem.pub"), ("k.pem.pub", "k.pem")):
        (tmp_path / there).write_text("mine")
        status, _, err = run("key", "generate", str(tmp_path / "k.pem"))
        assert (status, f"{there} is there already" in err) == (1, True)
        assert not (tmp_path / other).exists()
        assert (tmp_path / there).read_text() == "mine"
        (tmp_path / there).unlink()


def test_removed_versions_are_listed_with_how_long_they_last(
    tmp_path: Path, run: Run, data: Callable[..., Any]
) -> None:
    for seed, name in enumerate(("team/x", "team/x", "team/x", "team/x", "b/y", "b/y")):
        run("push", adapter(tmp_path, seed), name)
    assert run("list", "--removed")[1] == "no removed version can be restored\n"
    for ref in ("team/x@1", "team/x@2", "team/x@3", "b/y@1"):
        assert run("rm", ref)[0] == 0
    run("restore", "team/x@2")
    assert run("push", adapter(tmp_path, 2), "team/x")[0] == 0  # @3 again
    assert [found["version"] for found in data("list", "--removed")] == ["b/y@1", "team/x@1"]
    (found,) = data("list", "team/*", "--removed")
    assert datetime.fromisoformat(found["until"]) - datetime.fromisoformat(found["removed"]) == timedelta(days=7)
    out = run("list", "--removed")[1]
    assert "spared until" in out
    assert found["until"].replace("T", " ").removesuffix("Z") in out
    run("gc", "--retention", "0", "--grace", "0")
    assert data("list", "--removed") == []
    assert run("list", "--removed", "--tag", "prod")[0] == 2


def test_show_tells_who_holds_a_version(tmp_path: Path, run: Run, data: Callable[..., Any]) -> None:
    run("push", adapter(tmp_path, 1), "x")
    run("push", adapter(tmp_path, 2), "x")
    assert "held by" not in run("show", "x@1")[1]
    run("pin", "x@1", "--holder", "audit")
    run("pin", "x@1", "--holder", "server", "--for", "1h")
    assert re.search(r"  held by +audit, server until \d{4}-", run("show", "x@1")[1])
    assert "held by" not in run("show", "x@2")[1]
    assert [lease["holder"] for lease in data("show", "x@1")["leases"]] == ["audit", "server"]


def test_a_row_of_a_table_is_a_line_where_programs_read_it(tmp_path: Path, run: Run) -> None:
    run("push", adapter(tmp_path, 1), "x")
    for letter in ("a", "b"):
        run("pin", "x", "--holder", letter * 200)
    lines = run("log")[1].splitlines()
    assert len(lines) == 2 + 4
    assert [("a" * 200 in line, "b" * 200 in line) for line in lines[-2:]] == [(True, False), (False, True)]


def test_a_terminal_folds_cells_and_cuts_none(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("push", adapter(tmp_path, 1), "x")
    run("push", adapter(tmp_path, 2), "x")
    whole = run("show", "x")[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "80")
    folded = run("show", "x")[1]
    assert "\u2026" not in folded
    assert max(map(len, folded.rpartition("file")[2].splitlines())) <= 80
    for digest in re.findall(r"[0-9a-f]{64}", whole.rpartition("file")[2]):
        assert digest[:24] in folded
    compared = run("diff", "x@1", "x@2")[1]
    for part in ("q_proj", "v_proj", "lora_A", "lora_B"):
        assert part in compared
    assert "base_model." not in compared
