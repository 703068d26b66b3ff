"""Every kernel compiles for an H200 at an 8B model's shapes, within its registers and with 16-byte loads.

Needs no GPU: Triton brings the whole compiler. In another process, since Triton interprets or compiles for a
process's whole life.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Launches that move a weight, an adapter, keys and values: in steps of 16 bytes a thread, or at a fraction of the rate.
WIDE = {
    "shrink_rows",
    "expand_rows",
    "_shrink",
    "_expand",
    "_matmul",
    "_dequantize",
    "decode_rows",
    "_prefill",
    "_rms_norm",
    "_silu_mul",
}


@pytest.mark.timeout(120)  # 12 s; more where others compile too
def test_for_compute_capability_9(tmp_path: Path) -> None:
    root = Path(__file__).parents[4]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cross_compile.py"))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout)
    kernels = [kernel for case in cases.values() for kernel in case]
    assert {kernel["kernel"] for kernel in kernels} > WIDE
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= 113 * 1024, f"fewer than two programs fit a processor: {kernel}"
        assert kernel["wide"] or kernel["kernel"] not in WIDE, kernel
    assert [kernel["asked"] > 0 for kernel in cases["decode-early"]] == [True, True]
    assert not any(kernel["asked"] for name, case in cases.items() if name != "decode-early" for kernel in case)
    scatter, zero, finite = (kernel for kernel in kernels if kernel["kernel"] in ("_scatter", "_finite"))
    assert scatter["wide"]
    assert finite["wide"]
    assert not zero["wide"]  # it reads nothing
