"""The verbs about signatures, bundles and Hugging Face, as people type them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hub import cli
from tests.hub.fake_hugging_face import TOKEN, FakeHuggingFace
from tests.hub.making import lora_tensors, write_adapter

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("LORAPLEX_SIGNING_KEY", "LORAPLEX_SIGNING_PASSPHRASE", "LORAPLEX_TRUST"):
        monkeypatch.delenv(name, raising=False)

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
    def parsed(*arguments: str) -> Any:
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, ""), err
        return json.loads(out)

    return parsed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHuggingFace]:
    import huggingface_hub.constants as constants

    served = FakeHuggingFace()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    yield served
    served.close()


def adapter(tmp_path: Path, seed: int) -> str:
    return str(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)))


def test_the_story_of_a_signed_release(tmp_path: Path, run: Run, data: Callable[..., Any]) -> None:
    made = data("key", "generate")
    assert Path(made["key"]).parent == tmp_path / "config" / "loraplex"
    assert data("key", "show")["id"] == made["id"]
    status, out, err = run("key", "show")
    (tmp_path / "ada.pub").write_text(out)
    assert (status, "BEGIN PUBLIC KEY" in out, made["id"] in err) == (0, True, True)
    pushed = data("push", adapter(tmp_path, 1), "x", "--sign", "--alias", "prod")
    assert (pushed["signed_by"], pushed["aliases"]) == (made["id"], ["latest", "prod"])
    run("push", adapter(tmp_path, 2), "x")
    trusted = ["--require-signature", "--trust", str(tmp_path / "ada.pub")]
    assert run("pull", "x:prod", str(tmp_path / "good"), *trusted)[0] == 0
    status, _, err = run("pull", "x", str(tmp_path / "bad"), *trusted)
    assert (status, err) == (1, "error: x@2 is not signed (SIGNATURE_MISSING)\n")
    assert not (tmp_path / "bad").exists()
    assert run("verify")[1] == "2 versions checked, all sound\n"
    status, out, _ = run("verify", *trusted)
    assert (status, "SIGNATURE_MISSING" in out) == (1, True)
    assert run("verify", "x:prod", *trusted)[1] == "1 version checked, all sound and signed\n"
    assert run("sign", "x@2")[1].startswith("signed x@2\n")
    assert "was signed by this key before" in run("sign", "x@2")[1]
    assert run("verify", *trusted)[1] == "2 versions checked, all sound and signed\n"
    run("key", "generate", str(tmp_path / "bob"))
    assert data("sign", "x@2", "--key", str(tmp_path / "bob"))["signed_now"] is True
    found = data("signatures", "x@2", "--trust", str(tmp_path / "ada.pub"), "--out", str(tmp_path / "sigs"))
    assert sorted(each["state"] for each in found["signatures"]) == ["trusted", "unknown"]
    assert sorted(path.name for path in (tmp_path / "sigs").iterdir()) == ["1.sig", "2.sig"]
    status, _, err = run("pull", "x:prod", str(tmp_path / "o"), "--require-signature", "--trust", f"{tmp_path}/bob.pub")
    assert (status, "SIGNATURE_UNTRUSTED" in err) == (1, True)
    assert [event["kind"] for event in data("log") if event["kind"] == "sign"] == ["sign"] * 3


def test_wrong_usage(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = adapter(tmp_path, 1)
    run("key", "generate", str(tmp_path / "k"))
    for arguments in (
        ["pull", "x", "--require-signature"],
        ["pull", "x", "--trust", str(tmp_path / "k.pub")],
        ["push", directory, "x", "--key", str(tmp_path / "k")],
        ["export", "x"],
        ["export", "x", "y", "hf://a/b"],
        ["export", "x", "file", "--public"],
        ["export", "x", "file", "--gguf-lora", "other"],
        ["import", "hf://a/b"],
        ["import", "file", "x"],
        ["import", "hf://a/b", "x", "--renumber"],
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), arguments
        assert "Error: " in err
    for arguments, reason in (
        (["push", directory, "x", "--sign"], "KEY_UNUSABLE"),
        (["push", directory, "x", "--sign", "--key", str(tmp_path / "k.pub")], "KEY_UNUSABLE"),
        (["import", str(tmp_path / "nothing")], "HUB_UNAVAILABLE"),
        (["import", "hf://nobody", "x"], "SOURCE_INVALID"),
        (["export", "x", "hf://nobody"], "SOURCE_INVALID"),
    ):
        status, _, err = run(*arguments)
        assert (status, err.endswith(f"({reason})\n")) == (1, True), (arguments, err)
    assert not (tmp_path / "default-hub").exists(), "a key that cannot be read stops a push before it begins"
    monkeypatch.setenv("LORAPLEX_TRUST", str(tmp_path / "k.pub"))
    run("push", directory, "x")
    assert run("pull", "x", str(tmp_path / "free"))[0] == 0, "the environment names keys, it does not ask for them"
    assert run("pull", "x", str(tmp_path / "out"), "--require-signature")[0] == 1


def test_a_bundle_from_a_laptop_to_a_hub_without_network(
    tmp_path: Path, run: Run, data: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("key", "generate")
    key = str(tmp_path / "config" / "loraplex" / "signing.key.pub")
    for seed in (1, 2):
        run("push", adapter(tmp_path, seed), "team/x", "--sign")
    run("tag", "team/x@1", "prod")
    exported = data("export", "team/*", str(tmp_path / "x.bundle"))
    assert [each["version"] for each in exported["versions"]] == ["team/x@1", "team/x@2"]
    assert exported["aliases"] == ["team/x:latest", "team/x:prod"]
    assert run("export", "team/x", str(tmp_path / "x.bundle"))[0] == 1
    assert ":prod" in run("export", "team/x@1", str(tmp_path / "one.bundle"))[1]
    monkeypatch.setenv("LORAPLEX_HUB", str(tmp_path / "air-gapped"))
    run("key", "generate", str(tmp_path / "bob"))
    status, _, err = run(
        "import", f"{tmp_path}/x.bundle", "--require-signature", "--trust", str(tmp_path / "bob.pub")
    )  # fmt: skip
    assert (status, "SIGNATURE_UNTRUSTED" in err) == (1, True)
    assert not (tmp_path / "air-gapped").exists()
    status, out, _ = run("import", f"{tmp_path}/x.bundle", "--aliases", "--require-signature", "--trust", key)
    assert (status, "team/x:prod moved as in the bundle" in out) == (0, True)
    assert "team/x@2" in out
    found = data("import", f"{tmp_path}/x.bundle")
    assert [(each["outcome"], each["signatures_added"]) for each in found] == [("known", 0)] * 2
    assert data("show", "team/x:prod")["number"] == 1
    assert run("pull", "team/x:prod", str(tmp_path / "out"), "--require-signature", "--trust", key, "--offline")[0] == 0


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
def test_out_to_hugging_face_and_in_again(
    tmp_path: Path, run: Run, data: Callable[..., Any], fake: FakeHuggingFace
) -> None:
    run("push", adapter(tmp_path, 1), "x")
    status, out, err = run("export", "x", "hf://org/lora")
    assert (status, "exported x@1 to hf://org/lora at" in out) == (0, True)
    assert "no base_model" in err
    assert data("export", "x", "hf://org/lora", "--base-model", "org/base")["repository"] == "org/lora"
    assert b"base_model: org/base" in fake.repositories["org/lora"].commits[
        fake.repositories["org/lora"].branches["main"]
    ]["README.md"]  # fmt: skip
    status, out, err = run("import", "hf://org/lora", "y", "--alias", "prod")
    assert (status, "imported y@1" in out, "not taken: .gitattributes" in err) == (0, True, True)
    again = data("import", "hf://org/lora@main", "y")
    assert (again["created_now"], again["left_out"]) == (False, [".gitattributes"])
    assert again["manifest"]["recipe"]["imported_from"]["commit"] == again["commit"]
    status, _, err = run("import", "hf://org/nothing", "y")
    assert (status, err.endswith("(SOURCE_NOT_FOUND)\n")) == (1, True)
