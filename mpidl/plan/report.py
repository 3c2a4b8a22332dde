"""A plan: every number of ranks, strategy and codec, as rows and a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mpidl import codecs
from mpidl.plan import model
from mpidl.plan.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.plan.topology import Constants


def run(
    numbers: float,
    compute: float,
    ranks: Sequence[int],
    ranks_per_node: int,
    itemsize: int,
    constants: Constants,
) -> dict[str, Any]:
    """Return {"constants", "step_ms", "gradient_bytes", "rows"}, for `numbers` in a gradient.

    `compute` is the seconds of a rank's step alone. A row is one number of ranks, strategy and
    codec. On one node `hierarchical` uses no codec. Raises InvalidArgument.
    """
    nbytes, rows = numbers * itemsize, []
    for p in ranks:
        topology = Topology(p, ranks_per_node)
        for strategy in model.MODELS:
            for codec in (None, *codecs.CODECS):
                unused = strategy == "hierarchical" and topology.nodes == 1 and codec
                if model.accepts(strategy, codec) and not unused:
                    job = model.Job(nbytes, itemsize, codec)
                    rows.append(_row(strategy, job, topology, constants, compute))
    report = {"constants": asdict(constants), "step_ms": 1e3 * compute}
    return report | {"gradient_bytes": nbytes, "rows": rows}


def _row(
    strategy: str, job: model.Job, topology: Topology, constants: Constants, compute: float
) -> dict[str, Any]:
    found = model.times(strategy, job, topology, constants)
    apart, overlapped = model.step(compute, job.nbytes, found)
    return {
        "ranks": topology.ranks,
        "nodes": topology.nodes,
        "strategy": strategy,
        "codec": job.codec or "none",
        "average_ms": 1e3 * (found.reduce + found.share),
        "step_ms": 1e3 * apart,
        "overlapped_ms": 1e3 * overlapped,
        "efficiency": compute / apart,
        "overlapped_efficiency": compute / overlapped,
        "wire_bytes": found.wire,
    }


def show(report: dict[str, Any]) -> None:
    """Print the constants, and a table for each number of ranks, the quickest step first."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(_told(report["constants"]), highlight=False)
    rows = report["rows"]
    for key in dict.fromkeys((row["ranks"], row["nodes"]) for row in rows):
        here = [row for row in rows if (row["ranks"], row["nodes"]) == key]
        title = f"{key[0]} ranks on {key[1]} node{'s' * (key[1] > 1)}"
        caption = "ms; of it: the step alone; wire: GB through the busiest node's, one way"
        table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
        table.add_column("strategy", no_wrap=True)
        for name in ("average", "step", "of it", "overlap", "of it", "wire"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in sorted(here, key=lambda row: row["overlapped_ms"]):
            table.add_row(
                label(row["strategy"], row["codec"]),
                _ms(row["average_ms"]),
                _ms(row["step_ms"]),
                f"{row['efficiency']:.1%}",
                _ms(row["overlapped_ms"]),
                f"{row['overlapped_efficiency']:.1%}",
                f"{row['wire_bytes'] / 1e9:.3g}",
            )
        console.print(table)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def label(strategy: str, codec: str) -> str:
    """Return the name of a row: "ring+bf16"."""
    return strategy if codec == "none" else f"{strategy}+{codec}"


def _told(constants: dict[str, Any]) -> str:
    wire, local = constants["wire"], constants["local"]
    told = f"wire {wire['rate'] / 1e9:.4g} GB/s, {1e6 * wire['latency']:.3g} us"
    if wire["stall"]:
        told += f", stall {wire['stall']:.2f} beyond {wire['eager'] / 1e3:.0f} kB"
    if wire["held"]:
        told += f", {wire['held'] / 1e6:.1f} MB held"
    if local:
        told += f"; node {local['rate'] / 1e9:.4g} GB/s a rank, {1e6 * local['latency']:.3g} us"
    told += f"; memory {constants['memory_rate'] / 1e9:.4g} GB/s"
    told += f"; add {1e9 * constants['add_seconds']:.3g} ns a byte"
    return told + f"; MPI's algorithms: {constants['algorithms']}"
