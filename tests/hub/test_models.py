"""Whole models as versions: pushed, pulled, checked, refused, and found as a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hub.cli import group
from hub.errors import (
    AdapterFileMissing,
    AliasNotFound,
    BaseNotFound,
    BlobCorrupt,
    ConfigKeyRefused,
    ConfigMalformed,
    DtypeUnsupported,
    HubError,
    NonFinite,
    NotAnAdapter,
    ShapeMismatch,
    SignatureMissing,
    TensorMissing,
    TensorUnknown,
    UnexpectedFile,
)
from hub.facade import HubFacade
from hub.fingerprint import fingerprint_directory
from hub.hub import Hub
from hub.manifest import MODEL_SCHEMA, NO_LORA, Manifest
from hub.model_base import find_base
from hub.model_dir import parse_model
from tests.hub.making import f32, safetensors, write_adapter, write_base


def write_model(directory: Path, seed: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A fine-tune of `write_base`'s model."""
    write_base(directory, seed=seed)
    told = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**told, "architectures": ["TinyForCausalLM"], **(config or {})}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_a_model_is_pushed_found_pulled_and_verified(hub: HubFacade, tmp_path: Path) -> None:
    model, base = write_model(tmp_path / "model"), write_base(tmp_path / "base")
    pushed = hub.push(model, "team/whole:prod", base=str(base), parents=())
    assert pushed.created and pushed.version.text == "team/whole@1"
    manifest = hub.resolve("team/whole:prod").manifest
    assert manifest.kind == "model" and manifest.lora == NO_LORA and manifest.model is not None
    assert manifest.model.architecture == "TinyForCausalLM" and manifest.model.dtypes == ("F32",)
    assert manifest.model.tensors == 9 and manifest.model.parameters == 2 * 16 * 16 * 2 + 2 * 8 * 16 * 2 + 32 * 16
    assert manifest.base.fingerprint == fingerprint_directory(base).fingerprint
    assert not hub.push(model, "team/whole", base=str(base)).created
    hub.pull("team/whole", tmp_path / "pulled")
    assert fingerprint_directory(tmp_path / "pulled").fingerprint == fingerprint_directory(model).fingerprint
    assert hub.verify("team/whole") == [] and hub.fsck() == []
    second = hub.push(write_model(tmp_path / "next", seed=2), "team/whole", parents=["team/whole@1"])
    assert second.version.number == 2 and second.version.manifest.parents == (pushed.version.digest,)


def test_a_models_manifest_is_of_its_own_schema_and_an_adapters_as_ever(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        model = hub.push(write_model(tmp_path / "model"), "m").version.manifest
        adapter = hub.push(write_adapter(tmp_path / "adapter"), "a").version.manifest
    told = model.to_json()
    assert told["schema"] == MODEL_SCHEMA and "lora" not in told and told["model"]["tensors"] == 9
    assert Manifest.parse(model.canonical()) == model
    plain = adapter.to_json()
    assert plain["schema"] == "loraplex.manifest/1" and "model" not in plain and "kind" not in plain
    assert Manifest.parse(adapter.canonical()) == adapter


def spoil(model: Path, how: str) -> None:
    whole = model / "model.safetensors"
    match how:
        case "pickle":
            (model / "training_args.bin").write_bytes(b"x")
        case "code":
            (model / "modeling.py").write_text("raise SystemExit")
        case "link":
            (model / "merges.txt").symlink_to("/etc/passwd")
        case "auto_map" | "trust_remote_code":
            told = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**told, how: {"AutoModel": "modeling.X"}}))
        case "tokenizer code":
            (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.X", None]}}))
        case "no architecture":
            (model / "config.json").write_text("{}")
        case "nan":
            whole.write_bytes(safetensors({"a.weight": f32([[float("nan")]])}))
        case "packed":
            whole.write_bytes(safetensors({"a.weight": ("U8", (2,), b"ab")}))
        case "no weights":
            whole.unlink()
        case "shards without index":
            whole.rename(model / "model-00001-of-00001.safetensors")
        case "twice":
            (model / "model-00001-of-00002.safetensors").write_bytes(whole.read_bytes())
        case "index that lies":
            (model / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"gone": "model.safetensors"}})
            )


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("pickle", UnexpectedFile),
        ("code", UnexpectedFile),
        ("link", UnexpectedFile),
        ("auto_map", ConfigKeyRefused),
        ("trust_remote_code", ConfigKeyRefused),
        ("tokenizer code", ConfigKeyRefused),
        ("no architecture", ConfigMalformed),
        ("nan", NonFinite),
        ("packed", DtypeUnsupported),
        ("no weights", AdapterFileMissing),
        ("shards without index", AdapterFileMissing),
        ("twice", TensorUnknown),
        ("index that lies", TensorMissing),
    ],
)
def test_what_is_no_sound_model_is_refused(tmp_path: Path, how: str, error: type[HubError]) -> None:
    model = write_model(tmp_path / "model")
    parse_model(model)
    spoil(model, how)
    with Hub.open(str(tmp_path / "hub")) as hub:
        with pytest.raises(error):
            hub.push(model, "team/whole")
        assert hub.versions() == []


def test_shards_with_an_index_are_the_same_weights_as_one_file(tmp_path: Path) -> None:
    def tensors(layer: int) -> Any:
        random = np.random.default_rng(layer)
        return {f"l{layer}.{name}": f32(random.normal(size=(3, 4))) for name in "ab"}

    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two")
    (one / "model.safetensors").write_bytes(safetensors({**tensors(0), **tensors(1)}))
    (two / "model.safetensors").unlink()
    index = {}
    for layer in (0, 1):
        name = f"model-{layer + 1:05}-of-00002.safetensors"
        (two / name).write_bytes(safetensors(tensors(layer)))
        index |= dict.fromkeys(tensors(layer), name)
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert parse_model(one).tensors_digest == parse_model(two).tensors_digest
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(two, "team/shards").version
        hub.pull("team/shards", tmp_path / "pulled")
    assert len(version.manifest.files) == 5
    assert fingerprint_directory(tmp_path / "pulled") == fingerprint_directory(two)


@pytest.mark.parametrize("change", ["shape", "missing", "unknown"])
def test_a_model_must_have_its_bases_shapes(tmp_path: Path, change: str) -> None:
    base, model = write_base(tmp_path / "base"), write_model(tmp_path / "model")
    parsed = parse_model(model)
    tensors = {name: f32(np.ones(tensor.shape)) for name, tensor in parsed.tensors.items()}
    name = "model.layers.1.self_attn.o_proj.weight"
    if change == "shape":
        tensors[name] = f32(np.ones((16, 17)))
    elif change == "missing":
        del tensors[name]
    else:
        tensors["model.extra.weight"] = f32(np.ones((2, 2)))
    (model / "model.safetensors").write_bytes(safetensors(tensors))
    wanted = {"shape": ShapeMismatch, "missing": TensorMissing, "unknown": TensorUnknown}[change]
    with (
        Hub.open(str(tmp_path / "hub")) as hub,
        pytest.raises(wanted, match="extra" if change == "unknown" else "o_proj"),
    ):
        hub.push(model, "team/whole", base=str(base))


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    from server.adapters.directory import hub_fetch
    from training.engine_generator import find_adapters

    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(write_model(tmp_path / "model"), "team/whole").version
        other = hub.push(write_adapter(tmp_path / "adapter"), "team/whole").version
        with pytest.raises(NotAnAdapter, match=r"hub serve --base team/whole@1"):
            hub_fetch(hub)(version.digest)
        with pytest.raises(NotAnAdapter):
            find_adapters(["team/whole@1"], hub)
        with pytest.raises(NotAnAdapter):
            hub.diff("team/whole@1", "team/whole@2")
        assert other.manifest.kind == "adapter"


def test_a_base_may_be_a_model_of_the_hub(hub: HubFacade, tmp_path: Path, make_url: Any) -> None:
    del hub  # only so that there is one, over every engine
    url = make_url()
    assert find_base("smollm2-135m", url) == "smollm2-135m"
    assert find_base("HuggingFaceTB/SmolLM2-135M", url) == "HuggingFaceTB/SmolLM2-135M"
    assert find_base("team/whole", url) == "team/whole"  # not here: perhaps on Hugging Face
    with pytest.raises(HubError):
        find_base("team/whole:prod", url)
    with Hub.open(url) as opened:
        model = write_model(tmp_path / "model")
        version = opened.push(model, "team/whole:prod").version
        opened.push(write_adapter(tmp_path / "adapter"), "team/small")
    for name in ("team/whole", "team/whole@1", "team/whole:prod", f"team/whole@{version.digest}"):
        found = Path(find_base(name, url))
        assert found.name == "team--whole@1"
        assert fingerprint_directory(found).fingerprint == fingerprint_directory(model).fingerprint
    with pytest.raises(BaseNotFound, match="adapter"):
        find_base("team/small", url)
    with pytest.raises(AliasNotFound):
        find_base("team/whole:canary", url)


def test_a_cached_model_that_was_changed_is_fetched_anew(tmp_path: Path) -> None:
    url = str(tmp_path / "hub")
    with Hub.open(url) as opened:
        opened.push(write_model(tmp_path / "model"), "team/whole")
    found = Path(find_base("team/whole", url))
    whole = (found / "model.safetensors").read_bytes()
    (found / "model.safetensors").write_bytes(whole[:-4] + b"abcd")
    (found / "modeling.py").write_text("raise SystemExit")
    assert Path(find_base("team/whole", url)) == found
    assert (found / "model.safetensors").read_bytes() == whole and not (found / "modeling.py").exists()
    blobs = [
        path for path in (tmp_path / "hub" / "blobs").rglob("*") if path.is_file() and path.stat().st_size == len(whole)
    ]
    for blob in blobs:
        blob.chmod(0o644)
        blob.write_bytes(whole[:-4] + b"abcd")
    (found / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(BlobCorrupt):
        find_base("team/whole", url)


def test_the_verbs_show_models(tmp_path: Path) -> None:
    model, hub = write_model(tmp_path / "model"), str(tmp_path / "hub")

    def run(*args: str) -> str:
        result = CliRunner().invoke(group, [*args, "--hub", hub], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "whole model, TinyForCausalLM, 2,048 parameters, F32" in run("push", str(model), "team/whole")
    shown = run("show", "team/whole")
    assert "whole model, TinyForCausalLM" in shown and "tokenizer.json" in shown
    assert "TinyForCausalLM" in run("show", "team/whole", "--config")
    assert "model" in run("list") and "2,048" in run("list")
    run("verify", "team/whole")
    assert json.loads(run("show", "team/whole", "--json"))["manifest"]["model"]["parameters"] == 2048


def test_a_base_that_nobody_signed_is_refused_where_signatures_are_required(tmp_path: Path) -> None:
    from hub.signing import envelope
    from hub.signing.keys import generate

    url = str(tmp_path / "hub")
    key = generate(tmp_path / "signing.key")
    trusted = tmp_path / "trusted.pub"
    trusted.write_text(key.public.pem)
    with Hub.open(url) as hub:
        version = hub.push(write_model(tmp_path / "model"), "team/whole").version
        with pytest.raises(SignatureMissing):
            find_base("team/whole", url, [trusted])
        hub.add_signature(version.digest, envelope.sign(version, key))
    assert Path(find_base("team/whole", url, [trusted])).name == "team--whole@1"
