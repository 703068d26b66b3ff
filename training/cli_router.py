"""`hub continual router`: a finished run's router, fitted anew for the precision that a server holds the base in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json, print_table
from server.cli import bound_openmp
from server.config import Quantization
from training.quiet import quiet_libraries


@click.command(
    "router",
    epilog=examples(
        """
hub continual router six.yaml runs/six --quantize nf4 --out runs/six/router-nf4
hub serve --router six=runs/six/router-nf4                        # nf4 is how it holds the base
"""
    ),
)
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The router's directory.")
@click.option(
    "--quantize",
    type=click.Choice(get_args(Quantization)),
    help="How the server will hold the base.  [default: the plan's quantize]",
)
@click.option("--pin", is_flag=True, help="Name the run's versions, not the alias that promotions move.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
@json_option
def router_command(
    plan: Path, run: Path, out: Path, quantize: Quantization | None, pin: bool, threads: int, as_json: bool
) -> None:
    """Fit the router of RUN, the directory of a run of PLAN, for another precision of the base. Nothing is trained.

    The engine reads every task's prompts with the base held as asked for, as a server will read them; a router serves
    that precision alone. Printed is what it does with the evaluation prompts. It knows the tasks whose adapters were
    promoted, by the plan's alias unless --pin is given.
    """
    bound_openmp(threads)
    quiet_libraries()
    from training.continual.embedding import EngineEmbed
    from training.continual.errors import ContinualPlanInvalid
    from training.continual.plan import ContinualPlan
    from training.continual.record import RunRecord
    from training.continual.router import write_router
    from training.continual.routing import alias_names, route, version_names
    from training.continual.tasks import digests, prepare_data
    from training.output import check_free

    check_free(out)
    read, record = ContinualPlan.read(plan), RunRecord.read(run)
    if read.strategy != "isolated":
        raise ContinualPlanInvalid(f"strategy: {read.strategy} has one adapter for all tasks, and nothing to choose")
    record.check_plan(run, read)
    data = prepare_data(read, run)
    record.check_data(digests(data))
    names = version_names(record) if pin else alias_names(record)
    routed = route(data, names, EngineEmbed(read.base, quantize or read.quantize, threads))
    write_router(routed.router, out)
    rows = [
        {"task": task.label, "adapter": name, "prompts": len(task.evaluation), "right": right, "to_base": to_base}
        for task, name, right, to_base in zip(data, names, routed.right, routed.to_base, strict=False)
    ]
    if as_json:
        print_json({"router": str(out), "base": routed.router.base, "quantization": routed.router.quantization,
                    "layer": routed.router.layer, "tasks": rows})  # fmt: skip
    else:
        _show(out, routed.router.quantization, rows)


def _show(out: Path, quantization: str, rows: list[dict[str, Any]]) -> None:
    columns = ("task", "adapter", "prompts", "right", "to the base")
    print_table(
        columns,
        [
            (row["task"], row["adapter"] or "none promoted", str(row["prompts"]), f"{row['right']:.3f}",
             f"{row['to_base']:.3f}")
            for row in rows
        ],
    )  # fmt: skip
    click.secho(f"{out}: for the base in {quantization}, serve with --quantize {quantization}", bold=True)
