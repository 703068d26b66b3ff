"""What others do on the same card: PEFT's mixed batch, bitsandbytes' own product, transformers' continuous batching."""

from __future__ import annotations

import importlib.util
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_bench import Bench, Missing, Report
from benchmarks.gpu_engine import NEW, PROMPT, close_worlds
from benchmarks.gpu_model import LLAMA_8B, TINY, Shape, Step
from benchmarks.gpu_world import LINEARS, empty_llama, fill, release

BF16 = torch.bfloat16


def _needs_bitsandbytes(bench: Bench) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Missing("bitsandbytes is not installed")


def nf4_llama(shape: Shape, device: str) -> Any:
    """transformers' model over bitsandbytes' 4-bit layers, weights random."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    model = empty_llama(shape)
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        out, width = module.out_features, module.in_features
        layer = Linear4bit(width, out, bias=False, compute_dtype=BF16, quant_type="nf4", device="meta")
        dense = torch.randn(out, width, dtype=BF16, device=device) * width**-0.5
        layer.weight = Params4bit(
            dense, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        ).to(device)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    fill(model, device, BF16)
    return model


def peft(bench: Bench) -> Report:
    """32 rows, each with an adapter of its own, by PEFT's `adapter_names` over an NF4 base, against our mixed step."""
    _needs_bitsandbytes(bench)
    import peft as library

    warnings.simplefilter("ignore")
    close_worlds(bench)
    rows = 2 if bench.tiny else 32
    shape = TINY if bench.tiny else LLAMA_8B
    model: Any = nf4_llama(shape, bench.device)
    config = library.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(LINEARS))
    model = library.get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)
    for number in range(1, rows):
        if bench.left() < 12:
            raise Missing(f"no time left after {number} adapters")
        model.add_adapter(f"a{number}", config)
    model.eval()
    prompts = torch.randint(4, shape.vocabulary, (rows, 5 if bench.tiny else PROMPT), device=bench.device)
    names = [f"a{row}" for row in range(rows)]

    def seconds(new: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                adapter_names=names,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        _ = out[0, -1].item()
        return time.perf_counter() - start

    seconds(2)
    few, many = (2, 3) if bench.tiny else (2, 10)
    step = (seconds(many) - seconds(few)) / (many - few)
    ours = bench.figures.get(f"NF4 {rows} rows {rows} adapters step s")
    return {
        "rows": [
            {
                "rows": rows,
                "adapters": rows,
                "PEFT step ms": step * 1e3,
                "our step ms": ours and ours * 1e3,
                "times faster": ours and step / ours,
            }
        ]
    }


class TheirStep(Step):
    """The same decode step with bitsandbytes' products in the place of ours."""

    def _layer(self, packed: bool, arena_rows: int) -> dict[str, Any]:
        from bitsandbytes import functional

        layer = super()._layer(True, arena_rows)
        for name, (out, width) in self.shape.linears.items():
            dense = torch.randn(out, width, dtype=BF16, device=self.device) * width**-0.5
            layer[name] = functional.quantize_4bit(dense, quant_type="nf4", blocksize=64, compress_statistics=True)
        return layer

    def _product(self, layer: dict[str, Any], name: str, x: Tensor) -> Tensor:
        import bitsandbytes

        packed, state = layer[name]
        y: Tensor = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
        return y


def bitsandbytes_step(bench: Bench) -> Report:
    """A whole decode step, 32 rows at context 320, all kernels ours but the products: those are bitsandbytes'."""
    _needs_bitsandbytes(bench)
    close_worlds(bench)
    shape, batch, context = (TINY, 2, 40) if bench.tiny else (LLAMA_8B, 32, 320)
    taken: dict[str, float] = {}
    for name, kind in (("ours", Step), ("theirs", TheirStep)):
        step = kind(shape, batch, context, bench.device, packed=True, adapters=0)
        taken[name] = bench.seconds([step.run])
        del step
        release()
    return {
        "rows": [
            {
                "rows": batch,
                "ours ms": taken["ours"] * 1e3,
                "bitsandbytes ms": taken["theirs"] * 1e3,
                "times faster": taken["theirs"] / taken["ours"],
            }
        ]
    }


def continuous_batching(bench: Bench) -> Report:
    """32 base-only bf16 requests by transformers' continuous batching, against ours of the section `dense`."""
    if bench.device == "cpu":
        raise Missing("transformers' continuous batching needs a GPU")
    from transformers import GenerationConfig

    close_worlds(bench)
    model: Any = empty_llama(LLAMA_8B)
    fill(model, bench.device, BF16)
    prompts = [torch.randint(4, LLAMA_8B.vocabulary, (PROMPT,)).tolist() for _ in range(32)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=True)
    ours = bench.figures.get("bf16 base-only tokens/s")
    rows: list[dict[str, object]] = []
    # The names changed between releases; what this one does not know is skipped.
    for name in ("sdpa", "paged|sdpa", "sdpa_paged"):
        try:
            model.set_attn_implementation(name)
            best = 0.0
            for _ in range(2):
                start = time.perf_counter()
                out = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
                made = sum(len(result.generated_tokens) for result in out.values())
                best = max(best, made / (time.perf_counter() - start))
        except Exception as error:
            rows.append({"attention": name, "why not": f"{type(error).__name__}: {str(error)[:160]}"})
            continue
        rows.append({"attention": name, "their tokens/s": best, "our tokens/s": ours, "times": ours and ours / best})
        break
    del model
    release()
    if all("why not" in row for row in rows):
        raise Missing(f"this transformers runs none of them: {rows}")
    return {"rows": rows}
