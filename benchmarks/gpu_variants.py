"""The decode step of the kernels with one thing at a time changed, and what an earlier call found the fastest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_bench import Bench, Report
from benchmarks.gpu_model import LLAMA_8B, TINY, Step
from server.kernels.gpu import attention, cuda, launch, lora, nf4_cuda

Change = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def early(allowed: bool) -> Iterator[None]:
    before = launch.overlap(allowed)
    try:
        yield
    finally:
        launch.overlap(before)


@contextlib.contextmanager
def _all(*changes: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


Changed = Callable[[nf4_cuda.Cut, int, int, int], nf4_cuda.Cut]  # of a cut, for out, width and processors


@contextlib.contextmanager
def _each_cut(changed: Changed) -> Iterator[None]:
    """Every product by another cut."""
    chosen = nf4_cuda.best

    def best(rows: int, out: int, width: int, count: int, *rest: Any) -> nf4_cuda.Cut | None:
        cut = chosen(rows, out, width, count, *rest)
        return cut and changed(cut, out, width, count)

    with patch.object(nf4_cuda, "best", best):
        yield


def _by_registers(cut: nf4_cuda.Cut, out: int, width: int, count: int) -> nf4_cuda.Cut:
    return replace(cut, by_registers=True)


def _asking(mebibytes: int) -> Changed:
    return lambda cut, out, width, count: cut.asking(mebibytes << 20, out, width, count)


_BESIDE = "measured cuts, early"
_FIRST = ", shrink first"
_EARLY_ATTENTION = ", attention: EARLY 1"
_OTHER_CUTS: dict[str, tuple[Changed, ...]] = {
    "x by registers": (_by_registers,),
    **{f"{size} MiB of codes asked for early": (_asking(size),) for size in (4, 12, 36)},
    "x by registers, 12 MiB of codes asked for early": (_by_registers, _asking(12)),
}


@contextlib.contextmanager
def measured_cuts(bench: Bench) -> Iterator[None]:
    """Every product by the cut that the section `cuts` found the fastest, by Triton where that was; nothing changes
    for products it has not timed."""
    quickest = bench.cuts
    chosen = nf4_cuda.best

    def best(rows: int, out: int, width: int, *rest: Any) -> nf4_cuda.Cut | None:
        known = quickest.get((rows, out, width))
        return chosen(rows, out, width, *rest) if known is None else known[1]

    with patch.multiple(nf4_cuda, best=best, MOST_ROWS=64):
        yield


@dataclass(frozen=True)
class Fastest:
    """What an earlier call found: for each number of rows over NF4 a name of `_OTHER_CUTS`, or nothing; and what made
    every step shorter that was tried with it and without."""

    cuts: dict[int, str]
    shrink_first: bool
    early_attention: bool


def fastest_changes(report: Report) -> Fastest:
    """By an earlier call's section `variants`."""
    times: dict[tuple[int, int], dict[str, float]] = {}
    for row in report["sections"].get("variants", {}).get("rows", []):
        if row["base"] == "NF4" and row.get("same tokens") == 1:
            change = row["change"].removeprefix(_BESIDE)
            times.setdefault((row["rows"], row["adapters"]), {})[change] = row["ms"]
    alone = {"", *(f", {name}" for name in _OTHER_CUTS)}
    cuts = {}
    for (rows, adapters), known in times.items():
        if not adapters and alone & known.keys():
            cuts[rows] = min(alone & known.keys(), key=known.__getitem__).removeprefix(", ")

    def always(change: str) -> bool:
        tried = [known for known in times.values() if {"", change} <= known.keys()]
        return bool(tried) and all(known[change] < known[""] for known in tried)

    return Fastest(cuts, always(_FIRST), always(_EARLY_ATTENTION))


@contextlib.contextmanager
def written_changes(path: Path) -> Iterator[None]:
    """What an earlier call's JSON says of these, for everything from here on; a number of rows in between goes by the
    next larger one."""
    fastest = fastest_changes(json.loads(path.read_text(encoding="utf-8")))
    cuts = fastest.cuts
    chosen = nf4_cuda.best

    def best(rows: int, out: int, width: int, count: int, *rest: Any) -> nf4_cuda.Cut | None:
        cut = chosen(rows, out, width, count, *rest)
        known = min((size for size in cuts if size >= rows), default=None)
        for changed in _OTHER_CUTS.get(cuts[known], ()) if known else ():
            cut = cut and changed(cut, out, width, count)
        return cut

    print(f"by {path}: {fastest}")
    with (
        patch.object(nf4_cuda, "best", best),
        patch.object(lora, "SHRINK_FIRST", fastest.shrink_first),
        patch.object(attention, "EARLY", fastest.early_attention),
    ):
        yield


def _lora(cut: Any) -> contextlib.AbstractContextManager[Any]:
    return patch.object(lora, "_CUT", cut)


@contextlib.contextmanager
def _plain(*changes: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Nothing early and nothing wide, whatever serving does and the command line says; then these changes."""
    narrow = patch.object(nf4_cuda, "MOST_ROWS", nf4_cuda.MOST_ALONE)
    late = [patch.object(lora, "SHRINK_FIRST", False), patch.object(attention, "EARLY", False)]
    with early(False), narrow, _all(*late, *changes):
        yield


def variants(bench: Bench) -> Report:
    """The decode step again, as it is served and with one thing at a time added to the plain one, in the same process
    and over the same memory."""
    as_is: dict[str, Change] = {
        "as it is": contextlib.nullcontext,
        "plain": _plain,
        "early": lambda: _plain(early(True)),
    }
    products: dict[str, Change] = {
        "measured cuts": lambda: _plain(measured_cuts(bench)),
        _BESIDE: lambda: _plain(measured_cuts(bench), early(True)),
        **{f"{_BESIDE}, {name}": partial(_other_cuts, bench, cuts) for name, cuts in _OTHER_CUTS.items()},
    }
    first = patch.object(lora, "SHRINK_FIRST", True)
    adapters: dict[str, Change] = {
        f"{_BESIDE}, LoRA in Triton": lambda: _plain(measured_cuts(bench), early(True), _lora(lora._TILING)),
        _BESIDE + _FIRST: lambda: _plain(measured_cuts(bench), early(True), first),
        f"{_BESIDE}{_FIRST}, 12 MiB of codes asked for early": lambda: _other_cuts(bench, (_asking(12),), first),
    }
    seen: dict[str, Change] = {
        f"{_BESIDE}, attention: {', '.join(f'{key} {value}' for key, value in fields.items())}": partial(
            _attention, bench, fields
        )
        for fields in (
            {"EARLY": 1},
            {"STEP": 128},
            {"STEP": 128, "_WARPS": 8},
            {"_REGISTERS": 96},
            {"_REGISTERS": 128},
            {"_STAGES": 1},
        )
    }
    cases: list[tuple[int, int, bool, dict[str, Change]]]  # rows, adapters, whether NF4
    if bench.tiny:
        few = {
            name: change
            for name, change in (as_is | products | adapters).items()
            if "early" not in name or name.endswith(("Triton", "shrink first"))
        }
        cases = [(2, 2, True, few)]
    else:
        cases = [
            (32, 0, True, as_is | products | seen),
            (8, 0, True, as_is | products | seen),
            (1, 0, True, as_is | products),
            (32, 32, True, as_is | products | adapters),
            (64, 64, True, as_is | products | seen),
            (64, 0, True, as_is | products),
            (16, 16, True, as_is | products),
            (32, 0, False, as_is),
            (32, 32, False, as_is),
        ]
        _compile_all(bench)
    rows: list[dict[str, object]] = []
    shape, context = (TINY, 40) if bench.tiny else (LLAMA_8B, 320)
    for batch, count, packed, changes in cases:
        step = Step(shape, batch, context, bench.device, packed=packed, adapters=count)
        size = step.weight_bytes() + step.cache_bytes() + (step.adapter_bytes if count else 0)
        tokens = step.run()
        for name, change in changes.items():
            if bench.left() < 3:
                return {"rows": rows, "cut": f"no time left before {batch} rows, {name}"}
            base = "NF4" if packed else "bf16"
            row: dict[str, object] = {"base": base, "rows": batch, "adapters": count, "change": name}
            try:
                with change():
                    taken = bench.seconds([step.run], 5)
                    same = float((step.run() == tokens).double().mean())
                share = bench.share_of_bandwidth(size, taken)
                row |= {"ms": taken * 1e3, "times the floor": 1 / share if share else None, "same tokens": same}
            except Exception as error:  # one variant that cannot be launched hides no other
                row["failure"] = f"{type(error).__name__}: {str(error)[:200]}"
            rows.append(row)
        del step
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows}


def _other_cuts(
    bench: Bench, changes: Iterable[Changed], *more: contextlib.AbstractContextManager[Any]
) -> contextlib.AbstractContextManager[Any]:
    return _plain(measured_cuts(bench), early(True), *map(_each_cut, changes), *more)


def _attention(bench: Bench, fields: dict[str, int]) -> contextlib.AbstractContextManager[Any]:
    return _plain(
        measured_cuts(bench), early(True), *(patch.object(attention, name, value) for name, value in fields.items())
    )


def _compile_all(bench: Bench) -> None:
    """The products' cuts that the variants take, on all cores at once."""
    if not cuda.available():
        return
    device = torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.get_device_properties(device).multi_processor_count
    wanted: set[tuple[nf4_cuda.Cut, int]] = set()
    for (_, out, width), (_, known) in bench.cuts.items():
        for changes in _OTHER_CUTS.values():
            if known is not None:
                cut = known
                for changed in changes:
                    cut = changed(cut, out, width, count)
                wanted.add((cut, width))
    compile_cuts(wanted, device)


def compile_cuts(wanted: Iterable[tuple[nf4_cuda.Cut, int]], device: torch.device) -> None:
    """Cuts and the widths of their inputs, on all cores."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda one: nf4_cuda.prepared(one[0], one[1], device), set(wanted)))
