"""The whole engine on the GPU: are its answers right, how long is a step, what do adapters cost it."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import Bench, Report
from benchmarks.gpu_model import TINY, Shape
from benchmarks.gpu_world import LINEARS, World, empty_llama, fill, gpu_or_pretended, release, tokenizer
from server.adapters.weights import AdapterFiles
from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.request import AdapterUse, Request, Stopping

PROMPT, NEW = 256, 128
_SMALL = Shape("small", 4, 256, 512, 8, 2, 32, 512)


def answers(bench: Bench) -> Report:
    """The engine's tokens in float32 against generate() over PEFT, with and without captured steps; raises where one
    differs."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shape = TINY if bench.tiny else _SMALL
        model = empty_llama(shape)
        fill(model, "cpu", torch.float32)
        model.save_pretrained(root / "base")
        tokenizer(shape.vocabulary).save_pretrained(root / "base")
        _write_adapters(root)
        rows: list[dict[str, object]] = []
        kinds = ["none"] + (["nf4"] if importlib.util.find_spec("bitsandbytes") else [])
        for quantization in kinds:
            rows += _compare(bench, root, quantization, shape)
        if "nf4" not in kinds:
            rows.append({"base": "nf4", "same tokens": "bitsandbytes is not installed"})
    return {"rows": rows}


def _write_adapters(root: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    for number, rank in enumerate((8, 5, 33)):
        model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=16, target_modules=list(LINEARS))
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(root / str(number))


def _fetch(root: Path, digest: str) -> AdapterFiles:
    folder = root / digest
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    return AdapterFiles(digest, config.read_bytes(), weights.read_bytes(), None, None)


def _compare(bench: Bench, root: Path, quantization: Any, shape: Shape) -> list[dict[str, object]]:
    lengths = (3, 9) if bench.tiny else (3, 40, 130, 17, 64, 250)
    new = 3 if bench.tiny else 24
    prompts = [torch.randint(4, shape.vocabulary, (length,)).tolist() for length in lengths]
    uses = [None, "0", "1", "2", "0", "2"][: len(prompts)]
    config = ModelConfig(str(root / "base"), quantization, "float32", bench.device, threads=0)
    limits = EngineLimits(max_sequences=8, max_batch_tokens=96, kv_memory_bytes=64 << 20, adapter_memory_bytes=64 << 20)
    given = {}
    for captured in (True, False):
        with gpu_or_pretended(bench):
            engine = Engine.build(config, limits, lambda digest: _fetch(root, digest))
        if not captured:
            _uncaptured(engine)
        requests = [
            Request(
                id=str(row),
                prompt=tuple(prompt),
                stopping=Stopping(max_new_tokens=new, ignore_eos=True),
                adapters=() if use is None else (AdapterUse(use, f"bench/{use}@1"),),
            )
            for row, (prompt, use) in enumerate(zip(prompts, uses, strict=True))
        ]
        completions = engine.generate(requests)
        engine.close()
        failed = next((completion.error for completion in completions if completion.error is not None), None)
        if failed is not None:
            raise failed
        given[captured] = [list(completion.token_ids) for completion in completions]
        del engine
        release()
    meant = [_generated(bench, root, quantization, prompt, use, new) for prompt, use in zip(prompts, uses, strict=True)]
    if given[True] != given[False]:
        raise AssertionError(f"captured steps change tokens ({quantization}): {given}")
    if given[True] != meant:
        raise AssertionError(f"the engine's tokens are not PEFT's ({quantization}): {given[True]} instead of {meant}")
    return [{"base": f"{quantization}, float32", "rows": len(prompts), "tokens each": new, "same tokens": "all"}]


def _uncaptured(engine: Engine) -> None:
    steps: Any = engine._computing.gpu
    steps.capturing = False


def _generated(bench: Bench, root: Path, quantization: str, prompt: list[int], use: str | None, new: int) -> list[int]:
    import peft
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).to(bench.device)
    if quantization == "nf4":
        from bitsandbytes import functional

        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                packed, state = functional.quantize_4bit(
                    module.weight.data, quant_type="nf4", blocksize=64, compress_statistics=True
                )
                module.weight.data = functional.dequantize_4bit(packed, state).float()
    if use is not None:
        model = peft.PeftModel.from_pretrained(model, root / use)
    ids = torch.tensor([prompt], device=bench.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return list(out[0, len(prompt) :].tolist())


def packed_world(bench: Bench) -> World:
    """The NF4 engine that several sections share."""
    if "packed" not in bench.kept:
        bench.kept["packed"] = World(bench, packed=True, resident=4 if bench.tiny else 66)
    world: World = bench.kept["packed"]
    return world


def nf4_steps(bench: Bench) -> Report:
    """Decode steps of the engine over an 8B-shaped NF4 base, and the share of its speed that adapters leave it."""
    world = packed_world(bench)
    cases = [(2, 0), (2, 2)] if bench.tiny else [(1, 0), (8, 0), (32, 0), (32, 32), (64, 0), (64, 64)]
    report = _measured(bench, world, cases)
    steps: Any = world.engine._computing.gpu
    without = {"early": "NF4, none launched ahead", "capturing": "NF4, uncaptured"}
    for switch, name in without.items():
        if bench.tiny or bench.left() > 10:
            setattr(steps, switch, False)
            report["rows"] += _measured(bench, world, cases[:1] if bench.tiny else [(32, 0), (32, 32)], name)["rows"]
            setattr(steps, switch, True)
    if bench.device == "cuda":
        report["memory"] = {"plan": str(world.engine.memory), "peak bytes": torch.cuda.max_memory_reserved()}
    return report


def dense_steps(bench: Bench) -> Report:
    """The same over a bf16 base; frees the shared NF4 engine first."""
    close_worlds(bench)
    world = World(bench, packed=False, resident=4 if bench.tiny else 33)
    try:
        report = _measured(bench, world, [(2, 0), (2, 2)] if bench.tiny else [(32, 0), (32, 32)])
        bench.figures["bf16 base-only tokens/s"] = report["rows"][0]["tokens/s"]
    finally:
        world.close()
    return report


def close_worlds(bench: Bench) -> None:
    """Free the engines that sections share."""
    for world in bench.kept.values():
        world.close()
    bench.kept.clear()


def _measured(bench: Bench, world: World, cases: list[tuple[int, int]], name: str = "") -> Report:
    prompt, new = (3, 3) if bench.tiny else (PROMPT, NEW)
    rows: list[dict[str, object]] = []
    alone: dict[int, float] = {}
    name = name or ("NF4" if world.base.quantization == "nf4" else "bf16")
    for batch, adapters in cases:
        if bench.left() < 8:
            return {"rows": rows, "cut": f"no time left before {batch} rows with {adapters} adapters"}
        uses = [str(row % adapters) if adapters else None for row in range(batch)]
        world.run(uses, prompt, 1 if bench.tiny else 4)  # adapters loaded, kernels compiled
        _, taken = world.run(uses, prompt, new)
        try:
            step = world.decode_seconds(batch)
        except RuntimeError as error:  # hides no other
            rows.append(
                {"base": name, "rows": batch, "adapters": adapters, "failure": f"{error}: {world.steps.kinds()}"}
            )
            continue
        size = world.step_bytes(batch, prompt + new // 2, adapters)
        share = bench.share_of_bandwidth(size, step)
        before = alone.setdefault(batch, step)
        rows.append(
            {
                "base": name,
                "rows": batch,
                "adapters": adapters,
                "step ms": step * 1e3,
                "GB": size / 1e9,
                "times the floor": 1 / share if share else None,
                "of bandwidth": share,
                "kept share": before / step if adapters else None,
                "tokens/s": batch * new / taken,
            }
        )
        bench.figures[f"{name} {batch} rows {adapters} adapters step s"] = step
        bench.figures[f"{name} {batch} rows {adapters} adapters tokens/s"] = batch * new / taken
    return {"rows": rows}


def prefill(bench: Bench) -> Report:
    """Eight prompts of 2,048 tokens in one step, against the measured rate of a dense bf16 product."""
    world = packed_world(bench)
    shape = world.shape
    count, length = (2, 4) if bench.tiny else (8, 2048)
    weights = sum(out * width for out, width in shape.linears.values()) * shape.layers
    done = 2 * weights * count * length + 4 * count * length**2 / 2 * shape.heads * shape.width * shape.layers
    rows = []
    for adapters in (0, 2 if bench.tiny else 8):
        uses = [str(row % adapters) if adapters else None for row in range(count)]
        best = float("inf")
        for _ in range(1 if bench.tiny else 3):
            world.run(uses, length, 1)
            best = min(best, sum(step.seconds for step in world.steps.seen))
        ceiling = bench.ceilings.get("bf16_flops")
        rows.append(
            {
                "prompts": f"{count} x {length}",
                "adapters": adapters,
                "ms": best * 1e3,
                "tokens/s": count * length / best,
                "of the dense rate": done / best / ceiling if ceiling else None,
            }
        )
    return {"rows": rows}
