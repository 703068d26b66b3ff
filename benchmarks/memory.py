"""Where an engine's memory goes: bytes per adapter, per KV token, and peak RSS beside the sum of the parts.

    python -m benchmarks.memory [--quantize none nf4] [--threads 2] [--json out.json]

SmolLM2-135M at the limits `hub serve` has by default, 16 random adapters of rank 16, 16 requests of 32 new tokens; each
quantization in a process of its own. "computed" is what the shapes say, "in RAM" what the kernel says lies there
(/proc/self/pagemap for tensors, smaps for files), so memory that was never touched counts nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.figures import Figure, figures_table, markdown, mebibytes
from benchmarks.report import write_json

ADAPTERS = 16
NEW_TOKENS = 32
TITLES = {"none": "bf16", "nf4": "NF4", "int8": "int8"}


@dataclass(frozen=True)
class Part:
    """One thing that is held."""

    name: str
    computed: int | None  # bytes, from shapes; None where shapes say nothing
    resident: int  # bytes in RAM


@dataclass(frozen=True)
class Account:
    """One engine process."""

    parts: tuple[Part, ...]
    peak_loading: int  # VmHWM until the engine was built
    peak_serving: int  # VmHWM of loading the adapters and serving
    adapter_computed: int  # bytes on the device, one adapter
    adapter_resident: float
    host_adapter_computed: int
    host_adapter_grown: float  # RSS growth of one load
    kv_token_computed: int
    kv_token_resident: float
    notes: tuple[str, ...]

    @property
    def sum_of_parts(self) -> int:
        """Bytes in RAM that are explained."""
        return sum(part.resident for part in self.parts)


def table(account: Account) -> str:
    """The parts, their sum and the peak."""
    rows = [
        (part.name, "–" if part.computed is None else mebibytes(part.computed), mebibytes(part.resident))
        for part in account.parts
    ]
    rows.append(("**sum of the parts**", "", f"**{mebibytes(account.sum_of_parts)}**"))
    rows.append(("**peak RSS while serving**", "", f"**{mebibytes(account.peak_serving)}**"))
    rows.append(("peak RSS while loading the base", "", mebibytes(account.peak_loading)))
    each = [
        ("an adapter on the device", account.adapter_computed, account.adapter_resident),
        ("an adapter in host memory", account.host_adapter_computed, account.host_adapter_grown),
        ("a KV token", account.kv_token_computed, account.kv_token_resident),
    ]
    singles = markdown(
        ("bytes of", "computed", "measured"),
        [(name, f"{computed:,}", f"{measured:,.0f}") for name, computed, measured in each],
    )
    lines = [markdown(("MiB", "computed", "in RAM"), rows), "", singles]
    return "\n".join([*lines, *(["", *(f"* {note}" for note in account.notes)] if account.notes else [])])


def figures(account: Account, title: str) -> list[Figure]:
    """Measured against computed."""
    return [
        Figure(
            f"{title}: adapter on the device, measured / computed", account.adapter_resident / account.adapter_computed
        ),
        Figure(f"{title}: KV token, measured / computed", account.kv_token_resident / account.kv_token_computed),
        Figure(f"{title}: peak RSS / sum of the parts", account.peak_serving / account.sum_of_parts),
    ]


# -- inside the measured process -------------------------------------------------------------------------------------


def measure(base: Path, quantization: Any, threads: int, adapters: Path) -> Account:
    """Build, load, serve, count."""
    # What every process pays before there is a model: counted by itself.
    import importlib

    import torch
    from transformers.utils import logging as transformers_logging

    from benchmarks.population import Population
    from benchmarks.resident import Ledger, in_ram, mapped_files, reset_peak, status, tensors_in
    from benchmarks.watching import timed
    from benchmarks.workload import RANK
    from server.adapters.arena import row_bytes
    from server.config import EngineLimits, ModelConfig
    from server.engine.engine import Engine
    from server.model.base import load_base
    from server.model.packed import PackedLinear

    importlib.import_module("transformers.models.llama.modeling_llama")
    if quantization != "none":
        importlib.import_module("bitsandbytes")
    transformers_logging.disable_progress_bar()
    libraries = status("VmRSS")
    reset_peak()
    loaded = load_base(ModelConfig(base=str(base), quantization=quantization, threads=threads))
    shapes = {site: (linear.out_features, linear.in_features) for site, linear in loaded.linears().items()}
    population = Population(sorted(adapters.iterdir()), ADAPTERS)
    engine = Engine(loaded, EngineLimits(prefix_cache=False), population.fetch)
    engine.start()
    peak_loading = status("VmHWM")
    gc.collect()
    reset_peak()

    uses = [[population.use(n)] for n in range(ADAPTERS)]
    engine.adapters.load(uses[0][0].digest, uses[0][0].version)
    before = status("RssAnon")
    for (use,) in uses[1:]:
        engine.adapters.load(use.digest, use.version)
    grown = (status("RssAnon") - before) / (ADAPTERS - 1)
    timed(engine, uses, NEW_TOKENS)
    timed(engine, uses, NEW_TOKENS)
    peak_serving = status("VmHWM")

    ledger, internals = Ledger(), _Internals(engine)
    kv, arena = ledger.claim(internals.kv), ledger.claim(internals.arena)  # layers hold the arena's tensors too
    model: Any = loaded.model
    # A packed embedding holds nothing of its own: it reads its rows from the head.
    dense, head = list(model.get_input_embeddings().parameters()), model.get_output_embeddings()
    packed = [m for m in model.modules() if isinstance(m, PackedLinear) and m is not head]
    weight = {"none": 2.0, "nf4": 0.5 + 4 / 64, "int8": 1.0}[quantization]  # bytes; NF4's scales are float32 here
    linear_bytes = int(sum(m.in_features * m.out_features for m in packed) * weight)
    files = mapped_files()
    checkpoint = sum(size for path, size in files.items() if path.endswith(".safetensors"))
    embedded = ledger.claim(dense)
    in_file = any(_within_files(tensor.data_ptr()) for tensor in dense)
    parts = [
        Part("interpreter and libraries, before loading", None, libraries),
        Part("embedding, dense", embedded.bytes, embedded.resident),
    ]
    head_tensors = tensors_in(head)
    held_head = ledger.claim(head_tensors)
    if held_head.bytes:
        parts.append(Part("output head, packed", head.in_features * head.out_features * 2, held_head.resident))
    held_packed = ledger.claim(t for m in packed for t in tensors_in(m))
    parts.append(Part("linear layers, packed", linear_bytes, held_packed.resident))
    rest = ledger.claim([*model.parameters(), *model.buffers(), *_loose(model)])
    parts.append(Part("linear layers not packed, norms, tables", rest.bytes, rest.resident))
    slots = internals.slots
    kv_token = 2 * loaded.layers * loaded.kv_heads * loaded.head_width * loaded.dtype.itemsize
    parts.append(Part(f"KV pages, {slots:,} tokens", slots * kv_token, kv.resident))
    row = row_bytes(shapes, loaded.dtype)
    parts.append(Part(f"arena, {engine.adapters.rows_total} rows", engine.adapters.rows_total * row, arena.resident))
    hosted = internals.hosted
    host = ledger.claim(t for weights in hosted for site in weights.sites.values() for t in (site.a, site.b))
    parts.append(Part(f"adapters in host memory, {len(hosted)}", sum(w.bytes for w in hosted), host.resident))
    unused = max(checkpoint - (embedded.resident if in_file else 0), 0)
    parts.append(Part("checkpoint file, mapped and read but no tensor's any more", None, unused))
    notes = [
        "KV pages and arena are allocated and written with zeros at start: an idle engine takes as much as a full one."
    ]
    if dense and held_head.bytes and model.config.tie_word_embeddings:
        notes.append(
            f"held twice: the tied embedding, dense for look-ups ({mebibytes(embedded.bytes)} MiB) and packed as "
            f"output head ({mebibytes(held_head.bytes)} MiB)"
        )
    if unused:
        notes.append(
            f"{mebibytes(unused)} MiB of the checkpoint stay mapped after every tensor in them was packed; they are "
            "clean file pages, which the kernel drops when memory is short, but RSS counts them"
        )
    if hosted:
        notes.append("held twice: an adapter on the device keeps its host copy until --host-adapter-memory is full")
    device = next(s for s in engine.adapters.list() if s.digest == uses[0][0].digest).device_bytes
    assert device == RANK * row
    account = Account(
        parts=tuple(parts),
        peak_loading=peak_loading,
        peak_serving=peak_serving,
        adapter_computed=RANK * row,
        adapter_resident=arena.resident / engine.adapters.rows_total * RANK,
        host_adapter_computed=hosted[0].bytes,
        host_adapter_grown=grown,
        kv_token_computed=kv_token,
        kv_token_resident=kv.resident / slots,
        notes=tuple(notes),
    )
    probe = torch.ones(1 << 20)
    assert in_ram(probe.data_ptr(), 4 << 20) == 4 << 20  # the kernel tells, or all the above is nothing
    engine.close()
    return account


class _Internals:
    """What no public method gives: a benchmark of memory has to look into the cupboards."""

    def __init__(self, engine: Any) -> None:
        pages = engine._computing.runner.kv
        self.kv = [*pages.k, *pages.v]
        self.slots = pages.pages * pages.page_tokens
        arena = engine.adapters._arena
        self.arena = [*arena.a.values(), *arena.b.values()]
        self.hosted = list(engine.adapters._host.values())


def _loose(model: Any) -> Iterable[Any]:
    """Tensors that modules hold without registering them: joint weights, quantization states."""
    from benchmarks.resident import tensors_in

    for module in model.modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")}
        yield from tensors_in(own, 4)
        for parameter in vars(module).get("_parameters", {}).values():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                yield from tensors_in(state, 3)


def _within_files(address: int) -> bool:
    """Whether a tensor lies in a mapped checkpoint."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return line.endswith(".safetensors")
    return False


# -- the run ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure each quantization in a process of its own, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quantize", nargs="+", choices=("none", "nf4"), default=("none", "nf4"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--base", type=Path, default=None, help="a transformers directory (default: smollm2-135m)")
    parser.add_argument("--json", type=Path, default=None, help="also write everything to this file")
    parser.add_argument("--inside", type=Path, default=None, help=argparse.SUPPRESS)  # the adapters: be the process
    options = parser.parse_args(arguments)
    base = options.base
    if base is None:
        from server.model.builtin import smollm2_135m

        base = smollm2_135m()
    if options.inside is not None:
        account = measure(base, options.quantize[0], options.threads, options.inside)
        print(json.dumps(asdict(account)))
        return
    from benchmarks.mix16 import machine
    from benchmarks.workload import write_adapters

    accounts: dict[str, Account] = {}
    with tempfile.TemporaryDirectory(prefix="loraplex-memory-") as directory:
        write_adapters(base, Path(directory), ADAPTERS)
        for kind in options.quantize:
            command = [sys.executable, "-m", "benchmarks.memory", "--inside", directory, "--base", str(base)]
            command += ["--quantize", kind, "--threads", str(options.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            read = json.loads(done.stdout.splitlines()[-1])
            accounts[TITLES[kind]] = Account(
                **read | {"parts": tuple(Part(**part) for part in read["parts"]), "notes": tuple(read["notes"])}
            )
    where = machine(options.threads)
    print(f"Memory of an engine process with {ADAPTERS} adapters that served 16 x {NEW_TOKENS} tokens; {where}\n")
    for title, account in accounts.items():
        print(f"{title}\n\n{table(account)}\n")
    found = [figure for title, account in accounts.items() for figure in figures(account, title)]
    print(figures_table(found))
    if options.json:
        write_json(options.json, where, found, accounts={title: asdict(account) for title, account in accounts.items()})


if __name__ == "__main__":
    main()
