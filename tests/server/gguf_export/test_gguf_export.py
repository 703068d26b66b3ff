"""GGUF files say what they were made of: by our plain model, by transformers' own reader, by llama.cpp's rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner

from hub.cli import group
from hub.errors import TargetNotEmpty
from hub.hub import Hub
from server.errors import ExportNotEquivalent, ExportUnsupported
from server.gguf_export import export as exporting
from server.gguf_export.architecture import Architecture
from server.gguf_export.export import export_lora, export_model
from server.gguf_export.plain_model import read_alpha, read_tensors
from server.gguf_export.vocabulary import Vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:.*is_gradient_checkpointing:FutureWarning")

PROMPTS = ("a b c d", "the number 7", "hello 123456")
MakeAdapter = Callable[..., Path]


def family(tiny_base: Path, directory: Path, **settings: Any) -> Path:
    """A tiny random base of another family or with other settings, with `tiny_base`'s tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_base, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "gener*"))
    torch.manual_seed(5)
    shape = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16,
        "initializer_range": 0.2, "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    config = AutoConfig.for_model(settings.pop("model_type"), **{**shape, **settings})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, biases, own head": {"model_type": "llama", "attention_bias": True, "mlp_bias": True,
                                "tie_word_embeddings": False},
    "llama, wide heads": {"model_type": "llama", "head_dim": 32},
    "llama3 rope": {"model_type": "llama", "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "linear rope": {"model_type": "llama", "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}  # fmt: skip


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=list(FAMILIES))
def test_a_model_read_back_computes_the_same(tiny_base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    base = family(tiny_base, tmp_path / "base", **settings)
    parity = export_model(base, tmp_path / "model.gguf", "f32", "tiny", PROMPTS)
    assert parity.mean_kl < 1e-9 and parity.agreement == 1 and parity.positions > 20


def test_transformers_own_reader_gets_the_same_model_and_tokens(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    told = json.loads((base / "tokenizer.json").read_text())  # their reader wants at least one merge
    told["model"]["vocab"]["he"], told["model"]["merges"] = 260, [["h", "e"]]
    (base / "tokenizer.json").write_text(json.dumps(told))
    export_model(base, tmp_path / "model.gguf", "f32", "tiny", PROMPTS)
    source = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "model.gguf"}
    read: Any = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    original = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(torch.initial_seed() % 1000))
    with torch.inference_mode():
        assert torch.allclose(read(input_ids=ids).logits, original(input_ids=ids).logits, atol=1e-4)
    again, before = AutoTokenizer.from_pretrained(**source), AutoTokenizer.from_pretrained(base)
    text = "hello 123, wörld\n\n  x"
    assert 260 in before(text).input_ids
    assert again(text).input_ids == before(text).input_ids
    assert again.chat_template == before.chat_template and again.eos_token_id == 257


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_matrices_are_rounded_and_vectors_are_not(tiny_base: Path, tmp_path: Path, kind: Any) -> None:
    export_model(tiny_base, tmp_path / "model.gguf", kind, "tiny", PROMPTS) if kind == "f16" else None
    if kind == "bf16":
        with pytest.MonkeyPatch.context() as patched:  # this base's weights are large: rounding shows
            patched.setitem(exporting.LIMITS, "bf16", (1.0, 0.5))
            export_model(tiny_base, tmp_path / "model.gguf", kind, "tiny", PROMPTS)
    wanted = {"f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}[kind]
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        assert tensor.tensor_type == (wanted if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32)


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"target_modules": ["q_proj", "k_proj"]},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 5}, "alpha_pattern": {"k_proj": 40}},
}


@pytest.mark.parametrize("base_settings", [{"model_type": "llama"}, {"model_type": "qwen3"}], ids=["llama", "qwen3"])
@pytest.mark.parametrize("settings", LORAS.values(), ids=list(LORAS))
def test_a_lora_read_back_computes_what_peft_does(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any], base_settings: dict[str, Any]
) -> None:
    base = family(tiny_base, tmp_path / "base", **base_settings)
    adapter = make_adapter(base, tmp_path / "adapter", b_std=0.3, **settings)
    modules, parity = export_lora(adapter, "a", base, tmp_path / "lora.gguf", "f32", PROMPTS)
    assert parity.mean_kl < 1e-9 and parity.agreement == 1
    tensors = read_tensors(tmp_path / "lora.gguf")
    assert len(tensors) == 2 * modules
    assert read_alpha(tmp_path / "lora.gguf") == 16.0
    assert tensors["blk.1.attn_q.weight.lora_a"].shape[1] == 64
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["general.architecture"].contents() == base_settings["model_type"]


def test_rows_in_the_wrong_order_or_a_wrong_scale_are_noticed(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", b_std=0.3)
    with monkeypatch.context() as patched:
        real = exporting.lora_pairs

        def scaled(*args: Any) -> Any:
            pairs, alpha = real(*args)
            return pairs, alpha * 1.02

        patched.setattr(exporting, "lora_pairs", scaled)
        with pytest.raises(ExportNotEquivalent, match="mean KL"):
            export_lora(adapter, "a", tiny_base, tmp_path / "lora.gguf", "f32", PROMPTS)
    with monkeypatch.context() as patched:
        patched.setattr(Architecture, "reordered", lambda self, parameter, rows: rows)
        with pytest.raises(ExportNotEquivalent):
            export_model(tiny_base, tmp_path / "model.gguf", "f32", "tiny", PROMPTS)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*gguf*"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "saved": ({"modules_to_save": ["norm"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "bias": ({"lora_bias": True}, "lora_bias"),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "LoRA on the embedding"),
    "tied head": ({"target_modules": ["lm_head", "q_proj"]}, "copies of the base"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=list(REFUSED))
def test_what_a_gguf_lora_cannot_hold_is_refused_by_name(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **settings)
    with pytest.raises(ExportUnsupported, match=words):
        export_lora(adapter, "a", tiny_base, tmp_path / "lora.gguf", "f32", PROMPTS)
    assert not (tmp_path / "lora.gguf").exists()


def test_bases_that_would_come_out_wrong_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    windowed = family(tiny_base, tmp_path / "windowed", model_type="mistral", sliding_window=8)
    with pytest.raises(ExportUnsupported, match="one of 8 tokens"):
        Architecture.of(windowed)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    yarn = family(tiny_base, tmp_path / "yarn", model_type="llama", rope_parameters=rope)
    with pytest.raises(ExportUnsupported, match="yarn"):
        Architecture.of(yarn)
    with pytest.raises(TargetNotEmpty):
        export_model(tiny_base, tiny_base / "config.json", "f32", "tiny", PROMPTS)


def test_a_tokenizer_that_cuts_in_an_unknown_way_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    told = json.loads(file.read_text())
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    told["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_only],
    }
    file.write_text(json.dumps(told))
    assert Vocabulary.of(tmp_path / "base", 300).cut == "smollm"
    told["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    file.write_text(json.dumps(told))
    with pytest.raises(ExportUnsupported, match="Digits"):
        Vocabulary.of(tmp_path / "base", 300)


def test_the_verbs(tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\nwhat is this\n")
    with Hub.open(f"file://{tmp_path}/hub") as hub:
        hub.push(make_adapter(tiny_base, tmp_path / "adapter"), "team/x:prod", base=str(tiny_base))
    common = ("--hub", f"file://{tmp_path}/hub", "--base", str(tiny_base), "--prompts", str(prompts), "--threads", "1")

    def run(*args: str) -> Any:
        return CliRunner().invoke(group, [*args, *common])

    lora = run("export", "team/x", "--gguf-lora", f"{tmp_path}/x.gguf", "--json")
    assert lora.exit_code == 0, lora.output
    told = json.loads(lora.stdout)
    assert (told["version"], told["modules"], told["type"]) == ("team/x@1", 14, "f32") and told["mean_kl"] < 1e-9
    assert isinstance(run("export", "team/x", "--gguf-lora", f"{tmp_path}/x.gguf").exception, TargetNotEmpty)
    text = run("export", "team/x", "--gguf-lora", f"{tmp_path}/y.gguf", "--gguf-type", "f16").output
    assert "14 modules, f16" in text and "equal choices" in text

    only = run("merge", "team/x", "--gguf", f"{tmp_path}/m.gguf", "--gguf-type", "f32")
    assert only.exit_code == 0, only.output
    assert "m.gguf: f32, read back" in only.output and "hub serve" not in only.output
    both = run("merge", "team/x", "--gguf", f"{tmp_path}/b.gguf", "--gguf-type", "f32", "--out", f"{tmp_path}/m",
               "--json")  # fmt: skip
    assert both.exit_code == 0, both.output
    assert json.loads(both.stdout)["gguf"]["mean_kl"] < 1e-9 and (tmp_path / "m" / "config.json").exists()
    assert run("merge", "team/x").exit_code == 2
