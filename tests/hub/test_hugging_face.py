"""hf:// both ways, through huggingface-hub's own client against a fake of the HTTP API."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hub.errors import HubError, SourceInvalid
from hub.hub import Hub
from hub.hugging_face.address import Address
from hub.hugging_face.card import card_of
from hub.hugging_face.fetching import fetch
from hub.hugging_face.publishing import publish
from tests.hub.fake_hugging_face import TOKEN, FakeHuggingFace, Repository
from tests.hub.making import lora_tensors, write_adapter

# The client's own, when it puts a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHuggingFace]:
    import huggingface_hub.constants as constants

    served = FakeHuggingFace()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Read once, when the client is imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    yield served
    served.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.open(str(tmp_path / "hub")) as opened:
        yield opened


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def peft_repository(tmp_path: Path, **more: bytes) -> Repository:
    """As such repositories are: beside the adapter a tokenizer, pickled arguments, code and checkpoints."""
    files = files_of(write_adapter(tmp_path / "theirs", config={"revision": None}))
    repository = Repository()
    repository.commit({**files, "README.md": b"---\nlicense: mit\n---\n# Theirs\n"})
    extras = {
        ".gitattributes": b"*.safetensors lfs", "tokenizer.json": b"{}", "chat_template.jinja": b"{{ 1 }}",
        "training_args.bin": pickle.dumps(3), "evil.py": b"boom", "checkpoint-1/adapter_model.safetensors": b"x" * 900,
    }  # fmt: skip
    repository.commit({**repository.commits[repository.branches["main"]], **extras, **more})
    return repository


def test_only_an_adapters_files_are_taken_at_one_commit(fake: FakeHuggingFace, hub: Hub, tmp_path: Path) -> None:
    repository = fake.repositories["org/lora"] = peft_repository(tmp_path)
    (tmp_path / "in").mkdir()
    done: list[tuple[str, int, int]] = []
    fetched = fetch(Address.parse("hf://org/lora"), tmp_path / "in", lambda *told: done.append(told))
    head = repository.branches["main"]
    assert fetched.commit == head
    assert {"evil.py", "training_args.bin", "tokenizer.json"} < set(fetched.left_out)
    assert set(files_of(tmp_path / "in")) == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "loraplex.json",
    }  # fmt: skip
    asked = [path for method, path in fake.seen if "/resolve/" in path]
    assert asked
    assert all(f"/resolve/{head}/" in path for path in asked), "every file is of the commit that was looked up"
    assert not any(path.endswith((".py", ".bin", ".jinja", "tokenizer.json")) for path in asked)
    assert done[-1][:2] == ("downloading", done[-1][2])
    version = hub.push(tmp_path / "in", "team/x").version
    assert version.manifest.recipe["imported_from"] == {"url": "hf://org/lora", "commit": head}
    assert (
        hub.read_file(version, "adapter_model.safetensors")
        == (tmp_path / "theirs" / "adapter_model.safetensors").read_bytes()
    )


def test_revisions(fake: FakeHuggingFace, tmp_path: Path) -> None:
    repository = fake.repositories["org/lora"] = peft_repository(tmp_path)
    first = repository.commit(files_of(write_adapter(tmp_path / "v1", tensors=lora_tensors(seed=1))), "release/v1")
    repository.commit(files_of(write_adapter(tmp_path / "v2", tensors=lora_tensors(seed=2))))
    for number, revision in enumerate(["release/v1", first]):
        (tmp_path / f"in{number}").mkdir()
        assert fetch(Address.parse(f"hf://org/lora@{revision}"), tmp_path / f"in{number}").commit == first
        assert (tmp_path / f"in{number}" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "v1" / "adapter_model.safetensors"
        ).read_bytes()


def refusals() -> dict[str, tuple[str, Callable[[FakeHuggingFace, Path], object]]]:
    def without(*names: str) -> Callable[[FakeHuggingFace, Path], object]:
        def change(fake: FakeHuggingFace, tmp_path: Path) -> None:
            repository = fake.repositories["org/lora"]
            files = repository.commits[repository.branches["main"]]
            repository.commit({name: data for name, data in files.items() if name not in names})

        return change

    def pickled(fake: FakeHuggingFace, tmp_path: Path) -> None:
        without("adapter_model.safetensors")(fake, tmp_path)
        repository = fake.repositories["org/lora"]
        files = repository.commits[repository.branches["main"]]
        repository.commit({**files, "adapter_model.bin": pickle.dumps(1)})

    return {
        "no such repository": ("SOURCE_NOT_FOUND", lambda fake, path: fake.repositories.clear()),
        "gated": ("SOURCE_REFUSED", lambda fake, path: setattr(fake.repositories["org/lora"], "gated", True)),
        "busy": ("SOURCE_UNREACHABLE", lambda fake, path: setattr(fake, "failing", 10_000)),
        "away": ("SOURCE_UNREACHABLE", lambda fake, path: fake.close()),
        "no config": ("ADAPTER_FILE_MISSING", without("adapter_config.json")),
        "no weights": ("ADAPTER_FILE_MISSING", without("adapter_model.safetensors", "training_args.bin")),
        "a pickle alone": ("PICKLE_REFUSED", pickled),
        "other bytes than listed": ("SOURCE_ERROR", lambda fake, path: setattr(fake, "lying", b"x")),
    }


@pytest.mark.parametrize("how", refusals())
def test_what_cannot_be_imported_says_why(
    how: str, fake: FakeHuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.repositories["org/lora"] = peft_repository(tmp_path)
    reason, change = refusals()[how]
    change(fake, tmp_path)
    (tmp_path / "in").mkdir()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    with pytest.raises(HubError) as refused:
        fetch(Address.parse("hf://org/lora"), tmp_path / "in")
    assert refused.value.reason == reason
    assert "hf_" not in str(refused.value).replace("hf_hub", ""), "no token in a message"


def test_a_revision_that_is_not_there(fake: FakeHuggingFace, tmp_path: Path) -> None:
    fake.repositories["org/lora"] = peft_repository(tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(HubError, match="no revision v9") as refused:
        fetch(Address.parse("hf://org/lora@v9"), tmp_path / "in")
    assert refused.value.reason == "SOURCE_NOT_FOUND"


def test_a_version_goes_out_in_one_commit_with_a_card(fake: FakeHuggingFace, hub: Hub, tmp_path: Path) -> None:
    first = hub.push(write_adapter(tmp_path / "a"), "team/x").version
    source = write_adapter(tmp_path / "b", tensors=lora_tensors(seed=2), config={"base_model_name_or_path": "org/base"})
    (source / "README.md").write_text("---\nlicense: mit\ntags: [demo]\n---\n# Mine\n\nBody.\n")
    (source / "loraplex.json").write_text(json.dumps({"metrics": {"f1": 0.875}}))
    version = hub.push(source, "team/x", parents=["team/x@1"]).version
    made = publish(hub, "team/x@2", Address.parse("hf://org/new"))
    repository = fake.repositories["org/new"]
    assert repository.private, "nothing is made public unless somebody says so"
    assert repository.branches["main"] == made.commit
    there = repository.commits[made.commit]
    assert set(there) == {*version.manifest.files, ".gitattributes"}
    for name in ("adapter_config.json", "adapter_model.safetensors", "loraplex.json"):
        assert there[name] == (source / name).read_bytes()
    card = there["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "org/base"
    assert (front["license"], front["library_name"], front["tags"]) == ("mit", "peft", ["demo", "lora", "loraplex"])
    assert front["loraplex"]["digest"] == version.digest
    assert front["loraplex"]["parents"] == [first.digest]
    assert "# Mine" in card
    assert "| metric f1 | 0.875 |" in card
    assert f"team/x@1 {first.digest}" in card
    again = publish(hub, "team/x@2", Address.parse("hf://org/new"))
    assert again.commit == made.commit, "the same version again is no new commit"
    branch = publish(hub, "team/x@1", Address.parse("hf://org/new@v1"), public=True)
    assert repository.branches["v1"] == branch.commit
    assert repository.branches["main"] == made.commit
    assert not branch.has_base


def test_there_and_back_again(fake: FakeHuggingFace, hub: Hub, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    (source / "loraplex.json").write_text(json.dumps({"recipe": {"epochs": 3}, "metrics": {"f1": 0.5}}))
    mine = hub.push(source, "x").version
    made = publish(hub, "x", Address.parse("hf://org/new"))
    results = []
    for number in (1, 2):
        (tmp_path / f"in{number}").mkdir()
        fetch(Address.parse("hf://org/new"), tmp_path / f"in{number}")
        results.append(hub.push(tmp_path / f"in{number}", "y"))
    theirs = results[0].version
    assert theirs.manifest.tensors == mine.manifest.tensors
    assert theirs.manifest.metrics == {"f1": 0.5}
    assert theirs.manifest.recipe == {"epochs": 3, "imported_from": {"url": "hf://org/new", "commit": made.commit}}
    assert not results[1].created, "the same commit again is the same version"


def test_writing_needs_a_token_that_may(
    fake: FakeHuggingFace, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(write_adapter(tmp_path / "a"), "x")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError) as refused:
        publish(hub, "x", Address.parse("hf://org/new"))
    assert refused.value.reason in ("SOURCE_REFUSED", "SOURCE_NOT_FOUND")
    assert fake.repositories == {}
    assert "hf_other" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://x", "hf://x/y/z", "hf://../y", "hf://x/..", "hf://x/y@", "hf://x/y@../z", "hf://x/y?a=b",
     "hf://x /y", "https://huggingface.co/x/y", "hf://x/y@a b", "hf://тeam/x", "hf://x/y@" + "a" * 200, "hf://x/y.git"],
)  # fmt: skip
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(SourceInvalid):
        Address.parse(text)


@pytest.mark.parametrize(
    "readme",
    ["", "no front matter", "---\n---\nempty", "---\ntags: lora\n---\n", "--- \r\nlicense: mit\r\n---\r\nbody", "---\n",
     "text\n---\nlicense: x\n---\n"],
)  # fmt: skip
def test_a_card_is_made_of_any_readme(readme: str, hub: Hub, tmp_path: Path) -> None:
    version = hub.push(write_adapter(tmp_path / "a"), "x").version
    card = card_of(version, readme, "org/base", [])
    front: Any = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "org/base"
    assert "lora" in front["tags"]
    assert card_of(version, card, "org/base", []) == card, "made of itself it is itself"


@pytest.mark.parametrize(
    "readme", ["---\n- a\n- b\n---\n", "---\na: [\n---\n", "---\n!!python/object:os.system {}\n---\n"]
)
def test_front_matter_that_is_none_is_refused(readme: str, hub: Hub, tmp_path: Path) -> None:
    version = hub.push(write_adapter(tmp_path / "a"), "x").version
    with pytest.raises(SourceInvalid):
        card_of(version, readme, None, [])


def test_what_strangers_wrote_stays_text_in_the_card(hub: Hub, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a", config={"base_model_name_or_path": "x|<script>alert(1)</script>"})
    version = hub.push(source, "x").version
    assert "<script>" not in card_of(version, None, None, [])
