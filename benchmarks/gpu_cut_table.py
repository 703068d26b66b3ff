"""What a card's call of the section `cuts` found the fastest, put into server/kernels/gpu/nf4_cuts.json.

python -m benchmarks.gpu --sections ceilings cuts --json cuts.json     # on the card
python -m benchmarks.gpu_cut_table cuts.json --processors 132 --shared 233472
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gpu_model import LLAMA_8B
from server.kernels.gpu.nf4_cuda import Cut

TABLE = Path(__file__).parent.parent / "server" / "kernels" / "gpu" / "nf4_cuts.json"


def main(arguments: list[str] | None = None) -> None:
    """Replace one card's cuts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--processors", type=int, required=True)
    parser.add_argument("--shared", type=int, required=True, help="bytes of shared memory of a processor")
    options = parser.parse_args(arguments)
    report = json.loads(options.report.read_text(encoding="utf-8"))
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"cards": []}
    own = (options.processors, options.shared)
    others = [card for card in table["cards"] if (card["processors"], card["shared"]) != own]
    card = {"name": report["machine"]["device"], "processors": own[0], "shared": own[1]}
    written = {"cards": [*others, card | {"cuts": fastest(report["sections"]["cuts"]["rows"])}]}
    TABLE.write_text(text(written), encoding="utf-8")


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Of every product and number of rows, where that is not Triton's kernel."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["product"], row["rows"])
        if row.get("us", float("inf")) < min(row["Triton us"], best.get(key, {}).get("us", float("inf"))):
            best[key] = row
    names = [field.name for field in fields(Cut) if field.name in next(iter(best.values()))]
    return [
        {"out": LLAMA_8B.linears[product][0], "width": LLAMA_8B.linears[product][1]}
        | {name: row[name] for name in names}
        for (product, _), row in sorted(best.items())
    ]


def text(table: dict[str, Any]) -> str:
    """A cut a line."""
    cards = []
    for card in table["cards"]:
        head = json.dumps({name: value for name, value in card.items() if name != "cuts"})
        cuts = ",\n".join(f"  {json.dumps(cut)}" for cut in card["cuts"])
        cards.append(f'{head[:-1]}, "cuts": [\n{cuts}\n]}}')
    return '{"cards": [\n' + ",\n".join(cards) + "\n]}\n"


if __name__ == "__main__":
    main()
