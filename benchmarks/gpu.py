"""The GPU in one call: is it right, how fast is it, how far from what the card can do, what do others do there.

    python -m benchmarks.gpu [--sections ceilings correct engine …] [--minutes 8] [--json gpu.json] [--markdown gpu.md]

Runs under torch 2.11 to 2.13, transformers 5.17 to 5.23 and Triton 3.6 or 3.7, alone: no model is downloaded. Every
section has a budget of seconds and reports on its own; one that fails, or lacks something, is named with its reason and
the others go on. No kernel is timed before `correct` has passed, no engine whose `answers` were wrong; figures of an
engine whose answers were not checked say so, and why. `--tiny` runs
every section's code at toy shapes on any machine, in Triton's interpreter where there is no GPU; its times mean
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.gpu_bench import Bench, Missing, Report


def main(arguments: list[str] | None = None) -> Report:
    """Parse the command line, run the sections, write the reports."""
    from benchmarks.gpu_engine import close_worlds
    from benchmarks.gpu_kernels import written_cuts
    from benchmarks.gpu_sections import SECTIONS
    from benchmarks.gpu_variants import measured_cuts, written_changes
    from server.kernels.gpu import cuda, launch, nf4_cuda

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--markdown", type=Path, default=Path("gpu.md"))
    parser.add_argument(
        "--without",
        nargs="+",
        choices=["early", "wide"],
        default=[],
        metavar="WHAT",
        help="launches before the one in front has ended (early), products of 17 to 64 rows in CUDA C++ (wide)",
    )
    parser.add_argument("--cuts", type=Path, help="an earlier call's JSON, whose fastest cuts and variants are used")
    parser.add_argument("--triton", action="store_true", help="no kernels in CUDA C++")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the script itself")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("no CUDA device here; --tiny tries the script without one")
    cuda.refuse(options.triton)
    launch.overlap("early" not in options.without)
    nf4_cuda.MOST_ROWS = nf4_cuda.MOST_ALONE if "wide" in options.without else 64
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu", options.tiny)
    deadline = time.monotonic() + options.minutes * 60
    report: Report = {
        "machine": machine(),
        "tiny": options.tiny,
        "without": options.without,
        "triton": options.triton,
        "sections": {},
    }
    with contextlib.ExitStack() as changes:
        if options.cuts:
            written_cuts(bench, options.cuts)
            changes.enter_context(measured_cuts(bench))
            changes.enter_context(written_changes(options.cuts))
        for name in (name for name in SECTIONS if name in options.sections):
            section = SECTIONS[name]
            if section.engine and wrong(report, "answers"):
                result: Report = {"status": "missing", "why": "the engine's answers were wrong"}
            else:
                result = run(name, section.run, section.seconds, bench, deadline)
            if section.engine and (unchecked := not_checked(report)):
                for row in result.get("rows", []):
                    row["answers"] = unchecked
            report["sections"][name] = result
            print(f"{name}: {result['status']} {result.get('why', '')}", flush=True)
            # After every section: a call that is cut off still leaves what it has measured.
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            options.markdown.write_text(markdown(report), encoding="utf-8")
            if name == "correct" and result["status"] != "done":
                print("the kernels are wrong; nothing is timed")
                break
    close_worlds(bench)
    print(markdown(report))
    return report


def wrong(report: Report, name: str) -> bool:
    """Whether a section ran and found a wrong answer; one that could not run has found nothing."""
    return str(report["sections"].get(name, {}).get("why", "")).startswith("AssertionError")


def not_checked(report: Report) -> str | None:
    """Why nobody knows whether the engine's answers are right; None where they were found to be."""
    section = report["sections"].get("answers", {"why": "the section `answers` was not asked for"})
    return None if section.get("status") == "done" else f"not checked: {section['why']}"


def run(name: str, section: Callable[[Bench], Report], seconds: float, bench: Bench, deadline: float) -> Report:
    """One section's result with its status: done, missing or failed, and why."""
    start = time.monotonic()
    bench.until = min(start + seconds, deadline)
    if deadline - start < 5:
        return {"status": "missing", "why": "no time left"}
    try:
        result: Report = {"status": "done", **section(bench)}
    except Missing as missing:
        result = {"status": "missing", "why": str(missing)}
    except ModuleNotFoundError as error:
        result = {"status": "missing", "why": f"{error.name} is not installed", "trace": traceback.format_exc()}
    except Exception as error:
        result = {"status": "failed", "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    if bench.device == "cuda":
        torch.cuda.empty_cache()
    return result | {"took_seconds": round(time.monotonic() - start, 1)}


def machine() -> Report:
    """What this ran on."""
    import transformers
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def markdown(report: Report) -> str:
    """All rows of all sections as tables, and what is missing or failed by name."""
    where = report["machine"]
    lines = [
        f"# {where['device']}, torch {where['torch']}, transformers {where['transformers']}, Triton {where['triton']}",
        "",
    ]
    if report["tiny"]:
        lines += ["Toy shapes: the times mean nothing.", ""]
    for name, section in report["sections"].items():
        lines += [f"## {name}: {section['status']}" + (f" ({section['why']})" if "why" in section else ""), ""]
        rows = section.get("rows", [])
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
            lines += ["| " + " | ".join(shown(row.get(column)) for column in columns) + " |" for row in rows]
            lines.append("")
        if "memory" in section:
            lines += [f"Memory planned: {section['memory']['plan']}; peak {section['memory']['peak bytes']} bytes.", ""]
    return "\n".join(lines)


def shown(value: object) -> str:
    """A cell."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
