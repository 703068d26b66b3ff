"""The table of timed cuts, from a card's report."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.gpu_cut_table import TABLE, fastest, text
from server.kernels.gpu.nf4_cuda import Cut


def test_the_fastest_is_kept_and_tritons_is_not() -> None:
    def row(microseconds: float, outputs: int, rows: int = 8) -> dict[str, object]:
        cut = {"rows": rows, "outputs": outputs, "blocks": 4, "steps": 2, "warps": 8, "together": 1, "wgmma": False}
        return {"product": "out", "Triton us": 12.0, "us": microseconds, "apart": True, **cut}

    failed = {"product": "out", "Triton us": 12.0, "rows": 8, "failure": "no room"}
    [kept] = fastest([row(11.0, 16), row(9.0, 32), row(10.0, 48), failed, row(13.0, 64, rows=1)])
    assert (kept.pop("out"), kept.pop("width")) == (4096, 4096)
    assert Cut(**kept) == Cut(8, 32, 4, 2, 8, 1, apart=True)  # type: ignore[arg-type]


def test_the_table_is_written_as_it_is_kept() -> None:
    kept = TABLE.read_text(encoding="utf-8")
    assert text(json.loads(kept)) == kept
