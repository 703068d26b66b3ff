"""What `--deterministic` costs: tokens a second with and without it, engines in turn in one process.

    python -m benchmarks.deterministic --adapters 8 --prompt-tokens 64 --new-tokens 32

Random adapters of one `--kind` on the built-in base; for each number of requests at once, the two engines run in
turn `--repeats` times and the best of each counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from server.adapters.weights import AdapterFiles
from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.request import AdapterUse, Request, Stopping
from server.model.builtin import smollm2_135m
from tests.conftest import write_random_adapter

_ids = itertools.count()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--quantize", default="none")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--adapters", type=int, default=8)
    options.add_argument("--kind", choices=["lora", "dora", "saved-head", "saved-norms"], default="lora")
    options.add_argument("--prompt-tokens", type=int, default=64)
    options.add_argument("--new-tokens", type=int, default=32)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    asked = options.parse_args()

    model = ModelConfig(quantization=asked.quantize, dtype=asked.dtype, threads=asked.threads)
    with tempfile.TemporaryDirectory() as root:
        made = {f"a{i}": write_adapter(Path(root) / f"a{i}", asked.kind, i) for i in range(asked.adapters)}

        def fetch(digest: str) -> AdapterFiles:
            config, weights = (made[digest] / name for name in ("adapter_config.json", "adapter_model.safetensors"))
            return AdapterFiles(digest, config.read_bytes(), weights.read_bytes(), None, None)

        engines = [
            Engine.build(
                model,
                EngineLimits(
                    deterministic=deterministic,
                    kv_memory_bytes=128 << 20,
                    adapter_memory_bytes=128 << 20,
                    adapter_parts_memory_bytes=512 << 20,
                ),
                fetch,
            )
            for deterministic in (False, True)
        ]
        print(
            "| requests at once | tok/s | tok/s, --deterministic | cost | first token | first token, --deterministic |"
        )
        print("|---|---|---|---|---|---|")
        for count in asked.batches:
            best = [(0.0, 0.0), (0.0, 0.0)]
            for _, (i, engine) in itertools.product(range(asked.repeats + 1), enumerate(engines)):
                best[i] = max(best[i], measure(engine, count, asked.adapters, asked.prompt_tokens, asked.new_tokens))
            (plain, plain_first), (fixed, fixed_first) = best
            print(
                f"| {count} | {plain:.1f} | {fixed:.1f} | {plain / fixed:.1f}x "
                f"| {plain_first * 1000:.0f} ms | {fixed_first * 1000:.0f} ms |",
                flush=True,
            )
        for engine in engines:
            engine.close()


def write_adapter(target: Path, kind: str, seed: int) -> Path:
    """A random LoRA of rank 16 on all linears; with magnitudes, or the base's own head or norms as if trained."""
    base = smollm2_135m()
    write_random_adapter(base, target, rank=16, seed=seed)
    config = json.loads((target / "adapter_config.json").read_text())
    tensors = load_file(target / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    if kind == "dora":
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            path = key.removesuffix(".lora_A.weight")
            weight = weights[path.removeprefix("base_model.model.") + ".weight"]
            tensors[f"{path}.lora_magnitude_vector"] = weight.float().norm(dim=1)
        config["use_dora"] = True
    elif kind == "saved-head":
        tensors["base_model.model.lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        config["modules_to_save"] = ["lm_head"]
    elif kind == "saved-norms":
        tensors |= {f"base_model.model.{key}": w.clone() for key, w in weights.items() if key.endswith("norm.weight")}
        config["modules_to_save"] = ["norm"]
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def measure(engine: Engine, count: int, adapters: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """(tokens a second over the whole, mean seconds to the first token); the first call of an engine warms it."""
    rng = random.Random(count)
    requests = [
        Request(
            id=str(next(_ids)),
            prompt=tuple(rng.randrange(1000, 40_000) for _ in range(prompt_tokens)),
            stopping=Stopping(max_new_tokens=new_tokens, ignore_eos=True),
            adapters=(AdapterUse(f"a{i % adapters}", f"t/a{i % adapters}@1"),) if adapters else (),
        )
        for i in range(count)
    ]
    started = time.monotonic()
    answers = engine.generate(requests)
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    seconds = time.monotonic() - started
    firsts = [answer.deltas[-1].finish.timing.first_token for answer in answers if answer.deltas[-1].finish]
    return count * new_tokens / seconds, sum(firsts) / len(firsts)


if __name__ == "__main__":
    main()
