"""A merged model in AWQ's four bits, for deployments that serve one task.

llm-compressor (https://docs.vllm.ai/projects/llm-compressor) does the work, on a CPU or a GPU, offline. It asks for
another transformers than this project, so it gets an environment of its own:

    hub merge team/iam:prod --out iam-merged
    python3 -m venv awq && awq/bin/pip install torch llmcompressor
    awq/bin/python deploy/awq.py iam-merged iam-awq --calibration train.jsonl --check eval.jsonl

Calibration and check are chat JSONL, as `hub train` takes it. The result is read back and has to answer the check's
questions nearly as well as what went in: in nats a token of their own answers, at most --allowed worse.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch


def conversations(path: Path, count: int) -> list[list[dict[str, str]]]:
    """The messages of the first `count` lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line, _ in zip(lines, range(count), strict=False)]


def group_size(model: torch.nn.Module) -> int:
    """The largest power of two up to 128 that divides the inputs of every linear layer but the head."""
    inputs = [
        m.in_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]
    return next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if all(n % size == 0 for n in inputs))


@torch.inference_mode()
def answer_nats(model, tokenizer, asked: list[list[dict[str, str]]]) -> float:  # type: ignore[no-untyped-def]
    """Cross-entropy of each conversation's last answer, nats a token over all of them."""
    nats, tokens = 0.0, 0
    for messages in asked:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        before = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False).input_ids])
        logits = model(ids).logits[0, before - 1 : -1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, before:], reduction="sum").item()
        tokens += ids.shape[1] - before
    return nats / tokens


def quantize(model, tokenizer, asked: list[list[dict[str, str]]], max_length: int, out: Path) -> None:  # type: ignore[no-untyped-def]
    """Scale, round and write; `model` is changed."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():  # 0.14 pins memory for a device that is not there
        IntermediatesCache.pin_memory = lambda *_, **__: None
    rows = [
        tokenizer(
            tokenizer.apply_chat_template(messages, tokenize=False),
            add_special_tokens=False, truncation=True, max_length=max_length,
        )
        for messages in asked
    ]  # fmt: skip
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size(model))
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list([{"input_ids": row.input_ids, "attention_mask": row.attention_mask} for row in rows]),
        recipe=[AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
        max_seq_length=max_length,
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(str(out), save_compressed=True)
    tokenizer.save_pretrained(str(out))


def main() -> int:
    """Quantize, read back, compare, and only then give the directory its name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("merged", type=Path, help="what `hub merge --out` wrote")
    parser.add_argument("out", type=Path, help="the new directory")
    parser.add_argument("--calibration", type=Path, required=True, help="chat JSONL like what will be asked")
    parser.add_argument("--check", type=Path, required=True, help="other chat JSONL, with answers")
    parser.add_argument("--samples", type=int, default=128, help="lines of the calibration (default 128)")
    parser.add_argument("--questions", type=int, default=50, help="lines of the check (default 50)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a calibration line (default 512)")
    parser.add_argument("--allowed", type=float, default=0.1, help="nats a token that it may be worse (default 0.1)")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} exists")
    try:
        import llmcompressor  # noqa: F401
    except ImportError:
        parser.error(
            "llmcompressor is not installed here: python3 -m venv awq && awq/bin/pip install torch llmcompressor"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(given.merged))
    model = AutoModelForCausalLM.from_pretrained(str(given.merged), dtype="auto")
    asked = conversations(given.check, given.questions)
    before = answer_nats(model, tokenizer, asked)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out.parent, prefix=".awq-") as place:
        quantize(
            model, tokenizer, conversations(given.calibration, given.samples), given.max_length, Path(place, "new")
        )
        del model
        read = AutoModelForCausalLM.from_pretrained(str(Path(place, "new")), dtype="auto")
        after = answer_nats(read, tokenizer, asked)
        sizes = [sum(f.stat().st_size for f in at.glob("*.safetensors")) for at in (given.merged, Path(place, "new"))]
        print(f"answers: {before:.4f} -> {after:.4f} nats a token; weights: {sizes[0]:,} -> {sizes[1]:,} bytes")
        if not after - before <= given.allowed:
            print(f"worse by more than {given.allowed:g}: nothing is kept", file=sys.stderr)
            return 1
        for file in Path(place, "new").iterdir():
            file.chmod(0o644)  # some are written for their owner alone
        Path(place, "new").rename(given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
