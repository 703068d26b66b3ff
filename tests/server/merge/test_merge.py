"""A merged model equals PEFT's unmerged one, for every feature merge takes; whatever else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hub.errors import TargetNotEmpty
from hub.lora_config import LoraConfig
from server.errors import InvalidRequest, MergeNotEquivalent, TensorUnbound, UnsupportedAdapter
from server.merge import MergePart, merge_into
from server.merged_model import REPORT_FILE, MergePlan, write_merged

# PEFT makes the adapters and the reference here; its advice to trainers is not our subject.
pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21 on transformers 5.23
]

Trained = Callable[..., Path]
PROMPTS = ("a b c d", "the number 7", "x", "hello 123456")

MERGEABLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6}, "alpha_pattern": {"v_proj": 32}},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "trained biases": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
    "tied embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied head": {"target_modules": ["lm_head", "q_proj"]},
    "saved norm": {"modules_to_save": ["norm"]},
}


def plan(base: Path, out: Path, *parts: MergePart, dtype: str = "float32") -> MergePlan:
    return MergePlan(base, "biased", None, parts, out, dtype, PROMPTS)


@pytest.mark.parametrize("settings", MERGEABLE.values(), ids=list(MERGEABLE))
def test_merged_answers_as_peft_does(
    biased_base: Path, trained: Trained, tmp_path: Path, settings: dict[str, Any]
) -> None:
    out = tmp_path / "merged"

    merged = write_merged(plan(biased_base, out, MergePart("team/x@1", trained("adapter", **settings))))

    assert merged.saved.max_logit_delta < 1e-4
    assert merged.saved.mean_kl < 1e-9
    assert merged.saved.equal_tokens == merged.saved.generated_tokens == len(PROMPTS) * 33


def test_several_weighted_adapters_add_up(biased_base: Path, trained: Trained, tmp_path: Path) -> None:
    parts = (
        MergePart("team/a@1", trained("a", r=4), weight=0.7),
        MergePart("team/b@2", trained("b", r=8, use_rslora=True, target_modules=["q_proj", "o_proj"]), weight=-0.5),
        MergePart("team/c@3", trained("c", lora_bias=True, target_modules=["q_proj"]), weight=2.0),
    )

    merged = write_merged(plan(biased_base, tmp_path / "merged", *parts))

    assert merged.saved.max_logit_delta < 1e-4
    assert merged.saved.equal_prompts == len(PROMPTS)


def test_layers_that_keep_their_weights_transposed(gpt2_base: Path, trained: Trained, tmp_path: Path) -> None:
    adapter = trained("adapter", gpt2_base, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)

    merged = write_merged(plan(gpt2_base, tmp_path / "merged", MergePart("team/x@1", adapter)))

    assert merged.modules == 4
    assert merged.saved.max_logit_delta < 1e-4


def test_result_is_an_ordinary_model_that_differs_from_its_base(
    biased_base: Path, trained: Trained, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    merged = write_merged(plan(biased_base, out, MergePart("team/x@1", trained("adapter"))))

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(biased_base).chat_template
    ids = torch.tensor([tokenizer("hello").input_ids])
    logits = [AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in (out, biased_base)]
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert merged.modules == 6
    report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["equivalent"] is True
    assert report["adapters"] == [{"version": "team/x@1", "digest": None, "weight": 1.0}]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_bfloat16_rounds_the_weights_once_and_says_so(biased_base: Path, trained: Trained, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "merged"
    merged = write_merged(plan(biased_base, out, MergePart("team/x@1", trained("adapter")), dtype="bfloat16"))

    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert merged.exact.max_logit_delta < 1e-4 < merged.saved.max_logit_delta
    assert json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scale_two_percent_off_is_caught(
    biased_base: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    right = LoraConfig.scaling
    monkeypatch.setattr(LoraConfig, "scaling", lambda self, module, rank: 1.02 * right(self, module, rank))
    out = tmp_path / "merged"

    with pytest.raises(MergeNotEquivalent, match="mean KL is"):
        write_merged(plan(biased_base, out, MergePart("team/x@1", trained("adapter")), dtype=dtype))

    assert not out.exists()
    report = json.loads((tmp_path / "merged.rejected" / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["equivalent"] is False
    assert report["exact"]["mean_kl"] > report["exact"]["limits"]["mean_kl"]


def test_nan_in_the_merged_weights_is_caught(
    biased_base: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraConfig, "scaling", lambda self, module, rank: float("nan"))

    with pytest.raises(MergeNotEquivalent, match="is nan"):
        write_merged(plan(biased_base, tmp_path / "merged", MergePart("team/x@1", trained("adapter"))))


def test_a_taken_directory_is_refused_before_any_work(biased_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "precious").write_text("keep me", encoding="utf-8")

    with pytest.raises(TargetNotEmpty):
        write_merged(plan(biased_base, out, MergePart("team/x@1", tmp_path / "there is no adapter here")))

    assert [path.name for path in out.iterdir()] == ["precious"]


def test_an_empty_directory_is_taken(biased_base: Path, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()

    write_merged(plan(biased_base, out, MergePart("team/x@1", trained("adapter"))))

    assert (out / "config.json").is_file()


@pytest.mark.parametrize(
    ("settings", "weight", "named"),
    [
        ({"use_dora": True}, 0.5, "use_dora"),
        ({"modules_to_save": ["norm"]}, 0.5, "modules_to_save"),
        ({"bias": "lora_only"}, 2.0, "trained biases"),
        ({"trainable_token_indices": [3, 5]}, 1.0, "trainable_token_indices"),
    ],
    ids=["weighted dora", "weighted saved module", "weighted bias", "trainable tokens"],
)
def test_what_has_no_sum_is_refused_by_name(
    biased_base: Path, trained: Trained, settings: dict[str, Any], weight: float, named: str
) -> None:
    from transformers import AutoModelForCausalLM

    adapter = MergePart("team/x@1", trained("adapter", **settings), weight)

    with pytest.raises(UnsupportedAdapter, match=f"team/x@1 uses .*{named}"):
        merge_into(AutoModelForCausalLM.from_pretrained(biased_base), [adapter])


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, trained: Trained) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(TensorUnbound, match=r"team/x@1: model\.layers\.0\.\S+ is \[\d+, \d+\], its update"):
        merge_into(AutoModelForCausalLM.from_pretrained(tiny_base), [MergePart("team/x@1", trained("adapter"))])


def test_what_was_saved_is_what_is_proven(
    biased_base: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum was right, the disk is not."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def save_damaged(model: PreTrainedModel, *args: Any, **settings: Any) -> None:
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.05)
        save(model, *args, **settings)

    adapter = MergePart("team/x@1", trained("adapter"))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_damaged)

    with pytest.raises(MergeNotEquivalent, match=r"^as saved, "):
        write_merged(plan(biased_base, tmp_path / "merged", adapter))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(biased_base: Path, tmp_path: Path, weight: float) -> None:
    with pytest.raises(InvalidRequest, match="finite"):
        plan(biased_base, tmp_path / "merged", MergePart("team/x@1", tmp_path, weight))
