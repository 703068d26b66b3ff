"""Hostile adapters, rows 13 to 20: each refused with its reason, and the hub left as it was."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub.errors import AdapterRejected
from hub.hub import Hub
from tests.hub.making import (
    HIDDEN,
    KEYS,
    Tensors,
    bf16,
    f16,
    f32,
    key,
    lora_tensors,
    with_header,
    write_adapter,
    write_base,
)

Refused = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Hub.open(str(tmp_path / "hub")) as opened:
        yield opened


@pytest.fixture
def refused(hub: Hub, tmp_path: Path) -> Refused:
    """Push a directory that must be refused for a reason; the message, which names no path of the store."""

    def push(directory: Path, reason: str, base: Path | None = None) -> str:
        with pytest.raises(AdapterRejected) as caught:
            hub.push(directory, "team/x", base=str(base) if base else None)
        assert caught.value.reason == reason
        assert str(tmp_path / "hub") not in str(caught.value)
        assert hub.last_seq() == 0
        assert [path for path in (tmp_path / "hub" / "blobs").rglob("*") if path.is_file()] == []
        return str(caught.value)

    return push


# Row 13: pickles.


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "x.PTH", "weights.ckpt", "a.pkl"]
)
def test_row_13_a_pickle_is_refused_by_name_and_never_opened(tmp_path: Path, refused: Refused, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    directory = write_adapter(tmp_path / "adapter")
    (directory / name).write_bytes(pickle.dumps(Bomb()))
    assert name in refused(directory, "PICKLE_REFUSED")
    assert not (tmp_path / "exploded").exists()


def test_row_13_a_pickle_under_the_weights_name_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused(write_adapter(tmp_path / "a", weights=pickle.dumps({"x": [1] * 100})), "SAFETENSORS_MALFORMED")


def test_row_13_no_loader_of_pickles_is_in_the_package() -> None:
    sources = Path(__file__).parents[2] / "hub"
    for path in sources.rglob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text
        assert "import pickle" not in text


# Row 14: safetensors that lie.

A = key("q_proj", "lora_A.weight")


def entry(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


LIES = {
    "empty file": b"",
    "no header": b"\0" * 8,
    "length beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "length of 2^64-1": b"\xff" * 8 + b"{}",
    "header of 100 MB": struct.pack("<Q", 100 * 2**20) + b"{" + b" " * 64,
    "not JSON": with_header(b"{" + b"x" * 20),
    "array": with_header(b"[]"),
    "deep nesting": with_header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "key twice": with_header(b'{"x":' + header(a=entry())[5:-1] + b',"x":' + header(a=entry())[5:-1] + b"}", bytes(64)),
    "truncated data": with_header(header(a=entry()), bytes(63)),
    "bytes left over": with_header(header(a=entry()), bytes(65)),
    "overlap": with_header(header(a=entry(), b=entry(offsets=(32, 96))), bytes(96)),
    "same range twice": with_header(header(a=entry(), b=entry()), bytes(64)),
    "hole": with_header(header(a=entry(), b=entry(offsets=(72, 136))), bytes(136)),
    "end before begin": with_header(header(a=entry(offsets=(64, 0))), bytes(64)),
    "negative offset": with_header(header(a=entry(offsets=(-64, 0))), bytes(64)),
    "product wraps to the right size": with_header(
        header(a=entry(shape=(2**62, 4 * 2**30, 2**34 // 2**30, 1))), bytes(64)
    ),
    "2^64 elements": with_header(header(a=entry(shape=(2**32, 2**32), offsets=(0, 0)))),
    "fractional shape": with_header(header(a=entry(shape=(4.0, 4))), bytes(64)),
    "boolean shape": with_header(header(a=entry(shape=(True, 16))), bytes(64)),
    "unknown dtype": with_header(header(a=entry(dtype="OBJECT")), bytes(64)),
    "extra key": with_header(header(a={**entry(), "code": "x"}), bytes(64)),
    "metadata that is no text": with_header(header(__metadata__={"a": 1}, a=entry()), bytes(64)),
    "no tensors": with_header(b"{}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_row_14_a_safetensors_file_that_lies_is_refused(tmp_path: Path, refused: Refused, lie: str) -> None:
    refused(write_adapter(tmp_path / "a", weights=LIES[lie]), "SAFETENSORS_MALFORMED")


# Row 15: what is no plain file of an adapter.


@pytest.mark.parametrize(
    "name", ["setup.py", "adapter.zip", ".gitattributes", "model.safetensors", "README.MD", "a\nb", "\u202ex"]
)
def test_row_15_another_file_is_refused_by_name(tmp_path: Path, refused: Refused, name: str) -> None:
    directory = write_adapter(tmp_path / "a")
    (directory / name).write_text("x")
    message = refused(directory, "UNEXPECTED_FILE")
    assert ascii(name)[1:-1] in message
    assert message.isprintable()


def test_row_15_folders_and_archives_are_refused(tmp_path: Path, refused: Refused) -> None:
    directory = write_adapter(tmp_path / "a")
    (directory / "checkpoint-10").mkdir()
    assert "checkpoint-10" in refused(directory, "UNEXPECTED_FILE")
    with zipfile.ZipFile(tmp_path / "zipped.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    weights = (tmp_path / "zipped.safetensors").read_bytes()
    refused(write_adapter(tmp_path / "b", weights=weights), "SAFETENSORS_MALFORMED")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_row_15_a_link_is_refused_wherever_it_leads(tmp_path: Path, refused: Refused, name: str) -> None:
    directory = write_adapter(tmp_path / "a")
    outside = tmp_path / "outside"
    outside.write_bytes((directory / name).read_bytes() if (directory / name).exists() else b"secret")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(outside)
    assert name in refused(directory, "UNEXPECTED_FILE")


def test_row_15_a_pipe_in_a_files_place_does_not_hang(tmp_path: Path, refused: Refused) -> None:
    directory = write_adapter(tmp_path / "a")
    os.mkfifo(directory / "README.md")
    refused(directory, "UNEXPECTED_FILE")


def test_row_15_oversized_small_files_are_refused(tmp_path: Path, refused: Refused) -> None:
    directory = write_adapter(tmp_path / "a")
    (directory / "README.md").write_bytes(b"x" * (1024 * 1024 + 1))
    refused(directory, "ADAPTER_TOO_LARGE")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_row_15_a_directory_without_the_two_files_is_no_adapter(tmp_path: Path, refused: Refused, missing: str) -> None:
    (write_adapter(tmp_path / "a") / missing).unlink()
    assert missing in refused(tmp_path / "a", "ADAPTER_FILE_MISSING")


# Row 16: ranks.


@pytest.mark.parametrize("rank", [0, -1, 4097, 65_536])
@pytest.mark.parametrize("where", ["r", "pattern"])
def test_row_16_ranks_out_of_bounds_are_refused(tmp_path: Path, refused: Refused, rank: int, where: str) -> None:
    config = {"r": rank} if where == "r" else {"rank_pattern": {"q_proj": rank}}
    assert str(rank) in refused(write_adapter(tmp_path / "a", config=config), "RANK_INVALID")


def test_row_16_the_tensors_rank_is_the_configs(tmp_path: Path, refused: Refused) -> None:
    assert "rank 8" in refused(write_adapter(tmp_path / "a", tensors=lora_tensors(rank=8)), "RANK_INVALID")
    refused(write_adapter(tmp_path / "b", config={"rank_pattern": {"layers.1.self_attn.v_proj": 2}}), "RANK_INVALID")


def test_row_16_a_tensor_of_rank_zero_is_refused(tmp_path: Path, refused: Refused) -> None:
    tensors = {
        key("q_proj", "lora_A.weight"): f32(np.zeros((0, 16))),
        key("q_proj", "lora_B.weight"): f32(np.zeros((16, 0))),
    }
    refused(write_adapter(tmp_path / "a", tensors=tensors), "SHAPE_MISMATCH")


# Row 17: the wrong base, or tensors that bind to nothing.


def changed(**tensors: Any) -> Tensors:
    return {**lora_tensors(), **tensors}


def test_row_17_the_wrong_base_is_refused_naming_the_module(tmp_path: Path, refused: Refused) -> None:
    base = write_base(tmp_path / "base", hidden=2 * HIDDEN)
    assert "q_proj" in refused(write_adapter(tmp_path / "a"), "SHAPE_MISMATCH", base)


def test_row_17_a_module_the_base_lacks_is_refused_naming_it(tmp_path: Path, refused: Refused) -> None:
    tensors = {name.replace("layers.1", "layers.7"): tensor for name, tensor in lora_tensors().items()}
    message = refused(write_adapter(tmp_path / "a", tensors=tensors), "TENSOR_UNKNOWN", write_base(tmp_path / "base"))
    assert "model.layers.7.self_attn" in message


@pytest.mark.parametrize(
    "name",
    [
        "x.lora_A.weight",
        "base_model.model.q_proj.lora_A.default.weight",
        key("q_proj", "lora_E"),
        "base_model.model.x",
        "base_model.model.model.norm.weight",
        key("q_proj", "lora_magnitude_vector"),
        key("q_proj", "lora_B.bias"),
    ],
)
def test_row_17_tensors_of_unknown_purpose_are_refused(tmp_path: Path, refused: Refused, name: str) -> None:
    refused(write_adapter(tmp_path / "a", tensors=changed(**{name: f32(np.zeros(16))})), "TENSOR_UNKNOWN")


def test_row_17_a_factor_without_its_partner_is_refused(tmp_path: Path, refused: Refused) -> None:
    for suffix in ("lora_A.weight", "lora_B.weight"):
        tensors = lora_tensors()
        del tensors[key("v_proj", suffix)]
        assert "v_proj" in refused(write_adapter(tmp_path / suffix, tensors=tensors), "TENSOR_MISSING")


def test_row_17_dora_and_bias_tensors_must_be_there_when_the_config_says_so(tmp_path: Path, refused: Refused) -> None:
    refused(write_adapter(tmp_path / "a", config={"use_dora": True}), "TENSOR_MISSING")
    refused(write_adapter(tmp_path / "b", config={"lora_bias": True}), "TENSOR_MISSING")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        (key("q_proj", "lora_B.weight"), np.zeros((HIDDEN, 5))),
        (key("q_proj", "lora_A.weight"), np.zeros(64)),
        (key("q_proj", "lora_A.weight"), np.zeros((4, HIDDEN, 1))),
    ],
)
def test_row_17_factors_that_do_not_multiply_are_refused(
    tmp_path: Path, refused: Refused, name: str, array: np.ndarray[Any, Any]
) -> None:
    refused(write_adapter(tmp_path / "a", tensors=changed(**{name: f32(array)})), "SHAPE_MISMATCH")


def test_row_17_a_full_weight_must_be_listed_and_fit(tmp_path: Path, refused: Refused) -> None:
    base = write_base(tmp_path / "base")
    name = "base_model.model.model.layers.0.self_attn.o_proj.weight"
    config = {"modules_to_save": ["o_proj"]}
    refused(write_adapter(tmp_path / "a", tensors=changed(**{name: f32(np.ones((16, 16)))})), "TENSOR_UNKNOWN")
    wrong = changed(**{name: f32(np.ones((KEYS, 16)))})
    refused(write_adapter(tmp_path / "b", config=config, tensors=wrong), "SHAPE_MISMATCH", base)


# Row 18: numbers.

MAKERS = {"F32": f32, "F16": f16, "BF16": bf16}


@pytest.mark.parametrize("dtype", MAKERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_row_18_one_nan_or_infinity_is_refused(tmp_path: Path, refused: Refused, dtype: str, value: float) -> None:
    array = np.full((4, HIDDEN), 0.1, dtype=np.float32)
    array[3, 15] = value
    message = refused(write_adapter(tmp_path / "a", tensors=changed(**{A: MAKERS[dtype](array)})), "NON_FINITE")
    assert A in message


def test_row_18_every_nan_pattern_of_bf16_is_found(tmp_path: Path) -> None:
    from hub.errors import NonFinite
    from hub.safetensors_file import TensorSlot
    from hub.tensor_values import look_at

    for bits in [*range(0x7F80, 0x8000), *range(0xFF80, 0x10000)]:
        with pytest.raises(NonFinite):
            look_at("x", TensorSlot("BF16", (2,), 0, 4), memoryview(struct.pack("<HH", 0, bits)))


@pytest.mark.parametrize("scale", [1e6, 1e30, 3e38])
def test_row_18_absurd_values_are_refused(tmp_path: Path, refused: Refused, scale: float) -> None:
    refused(write_adapter(tmp_path / "a", tensors=changed(**{A: f32(np.full((4, HIDDEN), scale))})), "NORM_ABSURD")


def test_row_18_factors_whose_product_is_absurd_are_refused(tmp_path: Path, refused: Refused) -> None:
    refused(write_adapter(tmp_path / "a", tensors=lora_tensors(scale=1000)), "NORM_ABSURD")
    refused(write_adapter(tmp_path / "b", config={"lora_alpha": 1e8}), "NORM_ABSURD")


@pytest.mark.parametrize("dtype", ["I64", "U8", "F8_E4M3", "BOOL"])
def test_row_18_types_that_are_no_weights_are_refused(tmp_path: Path, refused: Refused, dtype: str) -> None:
    width = 8 if dtype == "I64" else 1
    tensors = changed(**{A: (dtype, (4, HIDDEN), bytes(4 * HIDDEN * width))})
    refused(write_adapter(tmp_path / "a", tensors=tensors), "DTYPE_UNSUPPORTED")


# Row 19: config with code keys.


@pytest.mark.parametrize(
    "keys",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "os"}},
        {"megatron_config": {"x": 1}},
        {"megatron_core": "evil.module"},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"trust_remote_code": True},
        {"auto_map": {"AutoModel": "modeling.Evil"}},
        {"custom_modules": ["x"]},
        {"_custom_modules": {}},
        {"layer_replication": [[0, 4]]},
        {"corda_config": {"cache_file": "/etc/passwd"}},
        {"use_qalora": True},
        {"arrow_config": {"top_k": 1}},
        {"kasa_config": {}},
    ],
)
def test_row_19_keys_off_the_allow_list_are_refused_by_name(
    tmp_path: Path, refused: Refused, keys: dict[str, Any]
) -> None:
    message = refused(write_adapter(tmp_path / "a", config=keys), "CONFIG_KEY_REFUSED")
    assert next(iter(keys)) in message


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_row_19_initializations_that_change_the_base_are_refused(tmp_path: Path, refused: Refused, name: str) -> None:
    message = refused(write_adapter(tmp_path / "a", config={"init_lora_weights": name}), "BASE_CHANGED_INIT")
    assert "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "PREFIX_TUNING", None, 3])
def test_row_19_other_methods_are_refused(tmp_path: Path, refused: Refused, kind: Any) -> None:
    refused(write_adapter(tmp_path / "a", config={"peft_type": kind}), "PEFT_TYPE_UNSUPPORTED")


def test_row_19_a_config_that_is_no_object_is_refused(tmp_path: Path, refused: Refused) -> None:
    for number, text in enumerate([b"", b"[]", b"\xff\xfe", b'{"r": 1, "r": 2}', b"[" * 100_000]):
        directory = write_adapter(tmp_path / str(number))
        (directory / "adapter_config.json").write_bytes(text)
        refused(directory, "CONFIG_MALFORMED")


def test_row_19_facts_that_are_no_facts_are_refused(tmp_path: Path, refused: Refused) -> None:
    texts = [
        "[]",
        '{"code": {}}',
        '{"recipe": 1}',
        '{"base": {"url": "x"}}',
        '{"base": {"fingerprint": "sha256:../.."}}',
        '{"metrics": {"loss": NaN}}',
        '{"schema": "other/1"}',
    ]
    for number, text in enumerate(texts):
        directory = write_adapter(tmp_path / str(number))
        (directory / "loraplex.json").write_text(text)
        refused(directory, "FACTS_MALFORMED")


# Row 20: templates and tokenizers.


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
    ],
)
def test_row_20_templates_and_tokenizers_come_from_the_base_only(tmp_path: Path, refused: Refused, name: str) -> None:
    directory = write_adapter(tmp_path / "a")
    (directory / name).write_text("{{ cycler.__init__.__globals__.os.popen('id') }}")
    message = refused(directory, "UNEXPECTED_FILE")
    assert name in message
    assert "come from the base" in message
