"""`mpidl plan`: predict steps on more ranks than there are."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 - typer looks at it when it runs
from typing import Annotated, Any

import numpy as np
import typer

from mpidl import bucket, cores
from mpidl.bench import jobs, plots
from mpidl.cli import launcher
from mpidl.cli.told import complain
from mpidl.errors import InvalidArgument, MpidlError, MPINotFound
from mpidl.plan import PAYLOAD, Constants, Link, measure, report, units
from mpidl.plan.topology import ALGORITHMS

LATENCY, MEMORY_RATE = "2us", "100GB"


def plan(
    params: Annotated[str, typer.Option(help="Parameters of the model: 1.5e9.")],
    step_ms: Annotated[
        str, typer.Option(help="Forward, backward and update of one rank, alone, in ms.")
    ],
    ranks: Annotated[str, typer.Option(help="Numbers of ranks: 8,64,512.")],
    ranks_per_node: Annotated[
        str, typer.Option(help="Ranks on a node, which share its wire and memory.")
    ] = "1",
    rate: Annotated[
        str, typer.Option(help="Of the wire of a node: 100gbit. Needed, unless hosts are measured.")
    ] = "",
    latency: Annotated[
        str, typer.Option(help=f"Of a message between nodes. Default: measured, or {LATENCY}.")
    ] = "",
    memory_rate: Annotated[
        str,
        typer.Option(
            help="Bytes a second that all ranks of a node read and write. Default: measured, or "
            f"{MEMORY_RATE}."
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="Of the gradient: float32 or float64.")] = "float32",
    algorithms: Annotated[
        str,
        typer.Option(
            help=f"Of MPI's collectives: {' or '.join(ALGORITHMS)}. Default: this MPI's, if "
            f"measured, or {ALGORITHMS[0]}."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw efficiency: .png, .svg or .pdf.")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Measure the constants in ranks, and use them.")
    ] = False,
    hosts: Annotated[
        str, typer.Option(metavar="a:2,b:2", help="Measure on these hosts, and their wire.")
    ] = "",
) -> None:
    """Predict the time of a step, and its efficiency, for each strategy and codec.

    From what the strategies send, and an alpha-beta-gamma model of the machine. What it assumes
    stands in docs/plan.md.

    Example: mpidl plan --params 42e6 --step-ms 220 --ranks 8,64 --rate 100gbit
    """

    def predicted() -> dict[str, Any]:
        numbers, compute = units.number(params, "params"), units.number(step_ms, "step-ms") / 1e3
        wanted, per_node = (
            units.counts(ranks, "ranks"),
            units.count(ranks_per_node, "ranks-per-node"),
        )
        known = [d.name for d in bucket.SUPPORTED_DTYPES]
        if dtype not in known:
            raise InvalidArgument(f"dtype {dtype!r}: expected one of {', '.join(known)}")
        if plot is not None:
            plots.check(plot)
        speed = units.rate(rate, "rate") if rate else None
        if hosts and not measured:
            raise InvalidArgument("hosts: expected --measure with it")
        alpha = units.seconds(latency, "latency") if latency else None
        memory = units.rate(memory_rate, "memory-rate") if memory_rate else None
        if measured:
            places = launcher.parse_hosts(hosts) if hosts else None
            number = sum(places.values()) if places else max(2, min(per_node, cores.available()))
            if speed is None and len(places or ()) < 2:
                raise InvalidArgument("rate: needed too, unless two or more hosts are measured")
            found = jobs.run("mpidl.cli.plan_ranks", number, places)
            constants = measure.constants(found, per_node, speed, alpha, memory, algorithms or None)
        elif speed is None:
            raise InvalidArgument("rate: expected that of a node's wire, such as --rate 100gbit")
        else:
            wire = Link(measure.LATENCY if alpha is None else alpha, PAYLOAD * speed)
            node = memory or units.rate(MEMORY_RATE, "memory-rate")
            constants = Constants(wire, node, algorithms=algorithms or ALGORITHMS[0])
        itemsize = np.dtype(dtype).itemsize
        return report.run(numbers, compute, wanted, per_node, itemsize, constants)

    try:
        found = predicted()
    except MpidlError as error:
        complain(error)
        raise typer.Exit(2 if isinstance(error, (InvalidArgument, MPINotFound)) else 1) from None
    if as_json:
        print(json.dumps(found))
    else:
        report.show(found)
    if plot is not None:
        plots.plan(found, plot)
