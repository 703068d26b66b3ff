"""A pulled directory is, unchanged, what other servers read: vLLM's filesystem resolver and NVIDIA NIM."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from hub.facade import HubFacade
from tests.hub.making import lora_tensors, write_adapter


def vllm_resolves(cache: Path, base_model_name: str, lora_name: str) -> Path | None:
    """What vLLM's `lora_filesystem_resolver` asks of VLLM_LORA_RESOLVER_CACHE_DIR before it loads an adapter.

    A directory of the adapter's name with adapter_config.json, of type LORA, for the base that is served.
    """
    directory = cache / lora_name
    config = directory / "adapter_config.json"
    if not config.exists():
        return None
    told = json.loads(config.read_text())
    fits = told["peft_type"] == "LORA" and told["base_model_name_or_path"] == base_model_name
    return directory if fits else None


def nim_finds(source: Path) -> list[str]:
    """The adapters under NIM_PEFT_SOURCE: folders with adapter_config.json and adapter_model.safetensors (or .bin)."""
    found = []
    for directory in sorted(path for path in source.iterdir() if path.is_dir()):
        names = {path.name for path in directory.iterdir()}
        if "adapter_config.json" in names and names & {"adapter_model.safetensors", "adapter_model.bin"}:
            found.append(directory.name)
    return found


def test_directories_side_by_side_are_what_vllm_and_nim_read(hub: HubFacade, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for number, name in enumerate(["sentiment", "terse"], start=1):
        source = write_adapter(
            tmp_path / name, tensors=lora_tensors(seed=number), config={"base_model_name_or_path": "org/base"}
        )
        (source / "README.md").write_text("# card")
        hub.push(source, f"team/{name}")
        hub.pull(f"team/{name}", tmp_path / "store" / name)
    for name in ("sentiment", "terse"):
        assert vllm_resolves(tmp_path / "store", "org/base", name) == tmp_path / "store" / name
    assert vllm_resolves(tmp_path / "store", "org/other", "terse") is None
    assert nim_finds(tmp_path / "store") == ["sentiment", "terse"]


def test_nothing_is_added_linked_or_changed(hub: HubFacade, tmp_path: Path) -> None:
    """No file of ours beside theirs: servers that hash, copy or list the directory see what was trained."""
    source = write_adapter(tmp_path / "source")
    (source / "README.md").write_text("# card")
    hub.push(source, "x")
    hub.pull("x", tmp_path / "out")
    pulled = list((tmp_path / "out").rglob("*"))
    assert {path.name for path in pulled} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert all(path.is_file() and not path.is_symlink() for path in pulled)
    assert all(path.read_bytes() == (source / path.name).read_bytes() for path in pulled)
    assert all(path.stat().st_mode & 0o400 for path in pulled)
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    [length] = struct.unpack("<Q", weights[:8])
    names = [name for name in json.loads(weights[8 : 8 + length]) if name != "__metadata__"]
    # PEFT's names, as both readers split them.
    assert all(
        name.startswith("base_model.model.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names
    )
