"""`mpidl bench plan`: what `mpidl plan` predicts, beside what is measured on the same hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl import plan
from mpidl.bench import jobs
from mpidl.bench.allreduce import write_size
from mpidl.errors import InvalidArgument
from mpidl.plan import measure

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZES = "16MiB"
TURNS = 5


def run(hosts: Mapping[str, int], sizes: list[int], turns: int = TURNS) -> dict[str, Any]:
    """Return {"machine", "constants", "rows"}: measured and predicted seconds of each strategy.

    The constants are measured in the same job, before. Raises InvalidArgument for one host, and
    for hosts with unequal numbers of ranks, which are not in the model.
    """
    if len(hosts) < 2 or len(set(hosts.values())) > 1:
        raise InvalidArgument("hosts: expected two or more, with as many ranks on each: a:2,b:2")
    report = jobs.run(
        "mpidl.bench.plan_ranks", sum(hosts.values()), hosts, sizes=sizes, turns=turns
    )
    local = next(iter(hosts.values()))
    found = measure.constants(report["constants"], local)
    for row in report["rows"]:
        topology = plan.Topology(row["ranks"], local)
        row["predicted_s"] = plan.predict(row["strategy"], None, row["bytes"], topology, found)
        row["over_measured"] = row["predicted_s"] / row["measured_s"]
    return report


def show(report: dict[str, Any]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    first = report["rows"][0]
    table = Table(title=f"averaging on {first['ranks']} ranks, {first['nodes']} nodes")
    for i, name in enumerate(("strategy", "size", "measured ms", "predicted ms", "/ measured")):
        table.add_column(name, justify="right" if i else "left")
    for row in report["rows"]:
        times = (f"{1e3 * row[key]:,.1f}" for key in ("measured_s", "predicted_s"))
        table.add_row(
            row["strategy"], write_size(row["bytes"]), *times, f"{row['over_measured']:.2f}"
        )
    Console().print(table)
