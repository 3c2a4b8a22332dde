"""`mpidl plan`: equations against simulations of what they stand for, units, fits and reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mpidl import codecs, plan
from mpidl.bench import plots
from mpidl.cli.app import app
from mpidl.errors import InvalidArgument
from mpidl.exchange import PIECE_BYTES
from mpidl.overlap import GROUP_BYTES
from mpidl.plan import collectives, formulas, measure, report, units
from mpidl.plan.formulas import Link

#: Each counts one thing only: messages, bytes, stalled bytes.
ALPHA, BETA, STALL = Link(1, math.inf), Link(0, 1), Link(0, 1, stall=1)
LINE = ("plan", "--params", "1e6", "--step-ms", "10", "--ranks", "1,4", "--rate", "1gbit")


def counts(cost: formulas.Cost) -> tuple[float, float, float]:
    """Return messages, bytes and added bytes, by links and a gamma that let nothing else count."""
    added = cost.seconds(Link(0, math.inf), 1)
    return cost.seconds(ALPHA, 0), cost.seconds(BETA, 0), added


def halving(n: float, p: int) -> tuple[float, float, float, list[float]]:
    """Walk through Rabenseifner's allreduce for p, a power of two, on one process."""
    messages, moved, added, sizes = 0, 0.0, 0.0, []
    part, distance = n, p // 2
    while distance:
        part /= 2
        sizes.append(part)
        messages, moved, added, distance = messages + 1, moved + part, added + part, distance // 2
    for size in reversed(sizes):
        messages, moved = messages + 1, moved + size
    return messages, moved, added, sizes * 2


@pytest.mark.parametrize("p", [1, 2, 4, 16, 64])
def test_rabenseifner_halves_and_doubles(p: int, rng: np.random.Generator) -> None:
    n, eager = float(rng.integers(1, 1 << 30)), float(rng.integers(1 << 20))
    messages, moved, added, sizes = halving(n, p)
    cost = formulas.rabenseifner(n, p)
    assert counts(cost) == pytest.approx((messages, moved, added))
    assert cost.wire == pytest.approx(moved)
    stalled = sum(max(0, size - eager) for size in sizes[1:])  # the first finds an empty link
    assert cost.seconds(Link(0, 1, 1, eager), 0) == pytest.approx(moved + stalled)


@pytest.mark.parametrize("p", [3, 5, 6, 7, 100])
def test_ranks_beyond_a_power_of_two_cost_two_arrays_more(p: int, rng: np.random.Generator) -> None:
    n, below = float(rng.integers(1, 1 << 30)), 2 ** int(math.log2(p))
    more = formulas.rabenseifner(n, p).nbytes - formulas.rabenseifner(n, below).nbytes
    assert more == pytest.approx(2 * n)


def test_small_arrays_are_doubled_and_large_ones_halved(rng: np.random.Generator) -> None:
    """MPI's textbook takes the quicker, which changes where alpha log2 p is as long as the rest."""
    constants = plan.Constants(Link(float(rng.uniform(1e-6, 1e-4)), 1e9), add_seconds=0)
    for nodes in (2, 8, 64):
        topology = plan.Topology(nodes)
        for n in (8.0, 4e6):
            seconds, _ = collectives.allreduce(n, topology, constants)
            doubled = formulas.recursive_doubling(n, nodes).seconds(constants.wire, 0)
            halved = formulas.rabenseifner(n, nodes).seconds(constants.wire, 0)
            assert seconds == pytest.approx(min(doubled, halved))
    assert collectives.allreduce(8, plan.Topology(64), constants)[0] == pytest.approx(
        6 * (constants.wire.latency + 8e-9)
    )


def relay(p: int, calls: int, m: float, held: float) -> float:
    """Simulate a chain: each process receives a call whole, then sends it, and is held m - held."""
    free = [0.0] * p  # when each process can receive the next call
    arrived = 0.0
    wire = [0.0] * p  # when the wire from each is free
    for _ in range(calls):
        arrived = 0.0
        for r in range(p - 1):
            start = max(wire[r], free[r] if r == 0 else arrived, free[r + 1])
            wire[r] = arrived = start + m
            free[r] = arrived - (min(held, m) if r else 0)
    return arrived


@pytest.mark.parametrize("p", [2, 3, 4, 7])
def test_a_chain_takes_as_long_as_its_simulation(p: int, rng: np.random.Generator) -> None:
    for _ in range(20):
        calls, m = int(rng.integers(1, 30)), float(rng.uniform(1, 100))
        held = float(rng.uniform(0, m)) if rng.integers(2) else 0.0
        cost = formulas.chain(calls * m, p, calls, held, add=True)
        assert cost.seconds(BETA, 0) == pytest.approx(relay(p, calls, m, held))
        assert cost.added == pytest.approx(calls * m)


@pytest.mark.parametrize("p", [2, 3, 5, 8])
def test_rings_send_all_parts_but_one(p: int, rng: np.random.Generator) -> None:
    n, chunk = float(rng.integers(1 << 21, 1 << 26)), 1 << 20
    sent = (p - 1) * n / p
    assert counts(formulas.ring_pass(n, p, add=True)) == pytest.approx((p - 1, sent, sent))
    assert counts(formulas.ring(n, p, chunk)) == pytest.approx((2 * p - 2, 2 * sent, sent))
    whole = formulas.ring(n, p, chunk).seconds(STALL, 0)
    stalled = 2 * sent - chunk if p == 2 else 0  # two are each other's neighbours
    assert whole == pytest.approx(2 * sent + stalled)


def test_trees_have_the_depth_that_they_need() -> None:
    for p in range(1, 70):
        assert formulas.rounds(p) == math.ceil(math.log2(p))
        assert 3 * math.ceil(math.log(p, 4) - 1e-9) == formulas.knomial(1, p).messages
        assert formulas.binomial(5, p, add=False).nbytes == 5 * math.ceil(math.log2(p))
        assert formulas.linear(5, p, add=True).added == 5 * (p - 1)


def test_costs_add_up(rng: np.random.Generator) -> None:
    n, k = float(rng.integers(1, 1000)), int(rng.integers(2, 9))
    link, gamma = Link(*rng.uniform(0.1, 2, 2).tolist()), float(rng.uniform())
    one, two = formulas.rabenseifner(n, 4), formulas.linear(n, 3, add=True)
    both = one.seconds(link, gamma) + two.seconds(link, gamma)
    assert (one + two).seconds(link, gamma) == pytest.approx(both)
    assert one.times(k).seconds(link, gamma) == pytest.approx(k * one.seconds(link, gamma))
    stalled = one.times(k).seconds(Link(0, 1, stall=1), 0) - k * one.nbytes
    assert stalled == pytest.approx(k * one.nbytes - n / 2)  # the first exchange does not
    assert (one.times(k).wire, (one + two).wire) == (k * one.wire, one.wire + two.wire)


@pytest.mark.parametrize("nodes", [2, 3, 8])
@pytest.mark.parametrize("local", [1, 4])
@pytest.mark.parametrize("codec", [None, *codecs.CODECS])
def test_the_wire_bounds_hierarchical(
    nodes: int, local: int, codec: str | None, rng: np.random.Generator
) -> None:
    """2 (N-1)/N of the array, encoded, on the wire of each node, however many ranks share it."""
    n, rate = float(rng.integers(1 << 26, 1 << 28)), 1e6  # a wire slower than all else
    constants = plan.Constants(Link(0, rate))
    made = codecs.make(codec)
    ratio = 1.0
    if isinstance(made, codecs.PowerSGD):  # and its work adds up
        constants = plan.Constants(Link(0, rate), 1e15, 0, codecs={"powersgd": (0, 0)})
        ratio = made.rank * 2 * 1024 / 1024**2
    elif made is not None:
        ratio = made.nbytes(PIECE_BYTES // 4) / PIECE_BYTES
    found = plan.times("hierarchical", plan.Job(n, 4, codec), plan.Topology(nodes * local, local),
                       constants)  # fmt: skip
    assert found.wire == pytest.approx(2 * (nodes - 1) / nodes * n * ratio)
    assert found.reduce + found.share == pytest.approx(found.wire / rate, rel=1e-3)


@pytest.mark.parametrize("strategy", plan.MODELS)
@pytest.mark.parametrize("algorithms", ["textbook", "openmpi"])
def test_more_of_anything_takes_longer(
    strategy: str, algorithms: str, rng: np.random.Generator
) -> None:
    """Bytes, latency, a slower wire, slower memory, slower sums: no prediction falls."""
    n, topology = float(rng.integers(1 << 16, 1 << 27)), plan.Topology(8, 2)
    usual = {"wire": Link(1e-5, 1e9), "memory_rate": 1e10, "add_seconds": 1e-10}
    worse = [
        {"wire": Link(1e-4, 1e9)},
        {"wire": Link(1e-5, 5e8)},
        {"memory_rate": 1e9},
        {"add_seconds": 1e-8},
    ]

    def seconds(nbytes: float = n, **change: object) -> float:
        constants = plan.Constants(**(usual | change), algorithms=algorithms)  # type: ignore[arg-type]
        return plan.predict(strategy, None, nbytes, topology, constants)

    assert seconds(2 * n) > seconds()
    assert all(seconds(**change) >= seconds() for change in worse)
    assert any(seconds(**change) > seconds() for change in worse)
    one = plan.predict(strategy, None, n, plan.Topology(1), plan.Constants(Link(1, 1)))
    assert one == 0


def test_no_strategy_beats_the_wire(rng: np.random.Generator) -> None:
    """2 (N-1)/N n beta is the least of any allreduce (Patarasuk and Yuan 2009, section 2)."""
    rate = float(rng.uniform(1e7, 1e9))
    for algorithms in ("textbook", "openmpi"):
        constants = plan.Constants(Link(0, rate), 1e12, 0, algorithms)
        for ranks, local in ((2, 1), (3, 1), (8, 1), (4, 2), (16, 4), (96, 8)):
            n, nodes = float(rng.integers(1 << 24, 1 << 26)), ranks // local
            for strategy in plan.MODELS:
                seconds = plan.predict(strategy, None, n, plan.Topology(ranks, local), constants)
                assert seconds >= 0.999 * 2 * (nodes - 1) / nodes * n / rate, (strategy, ranks)


#: Milliseconds measured with Open MPI 5 on hosts whose links were shaped to 500 and 100 Mbit/s:
#: (Mbit/s, hosts, ranks a host, strategy, MiB, ms). See docs/plan.md.
MEASURED = [
    (500, 2, 1, "allreduce", 16, 496),
    (500, 2, 2, "allreduce", 16, 280),
    (500, 3, 1, "allreduce", 16, 1191),
    (500, 4, 1, "allreduce", 16, 777),
    (500, 2, 1, "ring", 16, 465),
    (500, 2, 2, "ring", 16, 425),
    (500, 3, 1, "ring", 16, 377),
    (500, 4, 1, "ring", 16, 425),
    (500, 2, 1, "parameter_server", 8, 274),
    (500, 2, 2, "parameter_server", 16, 560),
    (500, 3, 1, "parameter_server", 16, 974),
    (500, 4, 1, "parameter_server", 16, 1334),
    (500, 2, 1, "sharded", 16, 293),
    (500, 2, 2, "sharded", 16, 637),
    (500, 3, 1, "sharded", 16, 406),
    (500, 4, 1, "sharded", 16, 522),
    (500, 2, 1, "hierarchical", 16, 290),
    (500, 2, 2, "hierarchical", 16, 316),
    (500, 3, 1, "hierarchical", 16, 411),
    (500, 4, 1, "hierarchical", 16, 470),
    (100, 2, 1, "allreduce", 8, 1162),
    (100, 3, 1, "allreduce", 8, 2952),
    (100, 4, 1, "allreduce", 8, 1809),
    (100, 3, 1, "ring", 8, 1034),
    (100, 4, 1, "ring", 8, 1120),
    (100, 2, 1, "parameter_server", 8, 1371),
    (100, 3, 1, "parameter_server", 8, 2653),
    (100, 4, 1, "parameter_server", 8, 3673),
]


@pytest.mark.parametrize(("mbit", "hosts", "local", "strategy", "mib", "ms"), MEASURED)
def test_predictions_are_near_what_was_measured(
    mbit: int, hosts: int, local: int, strategy: str, mib: int, ms: float
) -> None:
    wire = Link(1e-4, 0.959 * mbit * 1e6 / 8, stall=0.88, eager=240 << 10, held=2.3 * 2**20)
    constants = plan.Constants(wire, 10e9, 0.05e-9, "openmpi")
    topology = plan.Topology(hosts * local, local)
    assert plan.predict(strategy, None, mib << 20, topology, constants) == pytest.approx(
        ms / 1e3, rel=0.15
    )


def test_overlap_is_a_pipeline_of_groups(rng: np.random.Generator) -> None:
    for _ in range(20):
        compute, reduce, share = rng.uniform(0, 1, 3).tolist()
        groups = int(rng.integers(1, 20))
        made = done = compute / 3
        for _ in range(groups):
            made += compute * 2 / 3 / groups
            done = max(made, done) + reduce / groups
        apart, overlapped = plan.step(
            compute, groups * GROUP_BYTES[0], plan.Times(reduce, share, 0)
        )
        came = used = 0.0
        for _ in range(groups):
            came += share / groups
            used = max(came, used) + compute / 3 / groups
        assert overlapped == pytest.approx(done - compute / 3 + used)
        assert apart == pytest.approx(compute + reduce + share)


def test_units_are_read(rng: np.random.Generator) -> None:
    x = round(float(rng.uniform(0.1, 900)), 2)
    assert units.number(f"{x}e6", "x") == pytest.approx(x * 1e6)
    assert units.number(f" {x}G ", "x") == pytest.approx(x * 1e9)
    assert units.rate(f"{x}gbit", "x") == pytest.approx(x * 1e9 / 8)
    assert units.rate(f"{x} Mbit/s", "x") == pytest.approx(x * 1e6 / 8)
    assert units.rate(f"{x}GB/s", "x") == pytest.approx(x * 1e9)
    assert units.seconds(f"{x}us", "x") == pytest.approx(x * 1e-6)
    assert units.seconds("0ns", "x") == 0
    assert units.counts("8, 64,512", "x") == [8, 64, 512]


@pytest.mark.parametrize(
    ("read", "text"),
    [(units.number, t) for t in ("", "x", "-1", "0", "1e999", "1 2", "1.5us", "nan", "1e")]
    + [(units.rate, t) for t in ("", "100", "gbit", "0gbit", "1gbits", "-2MB", "1GiB", "1gbit/h")]
    + [(units.rate, t) for t in ("1gb", "1Gb", "100Gb/s")]  # bits, or bytes?
    + [(units.seconds, t) for t in ("", "2", "2m", "us", "-1us", "1 u s")]
    + [(units.counts, t) for t in ("", "0", "1.5", "8,", "8;64", "-8", "a")],
)
def test_wrong_units_are_named(read: object, text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^thing '.*': expected ") as caught:
        read(text, "thing")  # type: ignore[operator]
    assert repr(text.split(",")[-1]) in str(caught.value) or repr(text) in str(caught.value)


@pytest.mark.parametrize(("strategy", "codec"), [
    ("gossip", None), ("ring", "topk"), ("allreduce", "bf16"), ("sharded", "int8"),
    ("hierarchical", "zip"), ("ring", "powersgd"),
])  # fmt: skip
def test_what_cannot_be_predicted_is_refused(strategy: str, codec: str | None) -> None:
    with pytest.raises(InvalidArgument, match=codec or strategy):
        plan.predict(strategy, codec, 1e6, plan.Topology(4), plan.Constants(Link(0, 1)))


def test_impossible_machines_are_refused() -> None:
    for wrong in (
        {"ranks": 0},
        {"ranks": 4, "ranks_per_node": 0},
        {"ranks": 6, "ranks_per_node": 4},
    ):
        with pytest.raises(InvalidArgument, match="expected"):
            plan.Topology(**wrong)
    assert (plan.Topology(2, 8).local, plan.Topology(2, 8).nodes) == (2, 1)
    for rate, memory, algorithms in ((0, 1, "textbook"), (1, 0, "textbook"), (1, 1, "magic")):
        with pytest.raises(InvalidArgument, match="expected"):
            plan.Constants(Link(0, rate), memory, 0, algorithms)
    constants = plan.Constants(Link(0, 1), codecs={})
    with pytest.raises(InvalidArgument, match="'bf16': its speed is not known"):
        plan.predict("hierarchical", "bf16", 1e6, plan.Topology(2), constants)


def test_lines_and_stalls_are_found_again(rng: np.random.Generator) -> None:
    a, b, rate = (float(rng.uniform(1e-6, 1e-4)), float(rng.uniform(1e-10, 1e-8)), 6e7)
    x = np.sort(rng.choice(np.arange(1, 10_000) * 1000.0, 6, replace=False))
    assert measure.line(x, a + b * x) == pytest.approx((a, b))
    stall, eager = float(rng.uniform(0.2, 1)), float(rng.uniform(0, 4e5))
    sizes = np.array(measure.BOTH_WAYS, np.float64)
    seconds = (sizes + stall * (sizes - eager)) / rate
    assert measure.stalls(sizes, seconds, rate) == pytest.approx((stall, eager))
    assert measure.stalls(sizes, sizes / rate, rate) == (0, 0)
    assert measure.stalls(sizes, (sizes + 1e5) / rate, rate) == (0, 0)


def test_a_report_has_a_row_for_all_that_can_be(tmp_path: Path) -> None:
    constants = plan.Constants(Link(2e-6, 1e9))
    found = report.run(1e6, 0.01, [2, 8], 2, 8, constants)
    rows = json.loads(json.dumps(found))["rows"]
    feedback = [n for n in codecs.CODECS if getattr(codecs.make(n), "feedback", True)]
    ring = len(codecs.CODECS) - len(feedback)
    assert len(rows) == 2 * (len(plan.MODELS) + ring) + len(codecs.CODECS)
    assert found["gradient_bytes"] == 8e6
    for row in rows:
        codec = None if row["codec"] == "none" else row["codec"]
        topology = plan.Topology(row["ranks"], 2)
        average = plan.predict(row["strategy"], codec, 8e6, topology, constants, itemsize=8)
        assert row["average_ms"] == pytest.approx(1e3 * average)
        assert row["step_ms"] == pytest.approx(10 + row["average_ms"])
        assert row["efficiency"] == pytest.approx(10 / row["step_ms"])
        assert row["overlapped_efficiency"] == pytest.approx(10 / row["overlapped_ms"])
        assert 10 <= row["overlapped_ms"] <= row["step_ms"] + 1e-9
        assert (row["wire_bytes"] > 0) == (row["nodes"] > 1)
    plots.plan(found, tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn.count('<g id="line2d_') > len(rows) / 2


def test_the_table_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(report.run(1e8, 0.1, [4], 1, 4, plan.Constants(Link(2e-6, 1e9, 0.5, 1e5, 1e6))))
    told = capsys.readouterr().out
    assert "4 ranks on 4 nodes" in told and "stall 0.50" in told and "1.0 MB held" in told
    for strategy in plan.MODELS:
        assert told.count(f" {strategy} ") == 1
    for codec in codecs.CODECS:
        assert told.count(f" hierarchical+{codec} ") == 1


def test_the_command_prints_json_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "p.png"
    done = CliRunner().invoke(app, [*LINE, "--json", "--latency", "5us", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert {row["ranks"] for row in found["rows"]} == {1, 4}
    assert found["constants"]["wire"]["latency"] == pytest.approx(5e-6)
    assert found["constants"]["wire"]["rate"] == pytest.approx(1e9 / 8 * plan.PAYLOAD)
    assert found["gradient_bytes"] == 4e6
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(("more", "said"), [
    (("--rate", "1gbyte"), "rate '1gbyte': expected"),
    (("--rate", ""), "rate: expected that of a node's wire"),
    (("--ranks", "4,x"), "ranks 'x': expected"),
    (("--ranks", "6", "--ranks-per-node", "4"), "6 ranks, 4 a node"),
    (("--params", "many"), "params 'many': expected"),
    (("--step-ms", "10ms"), "step-ms '10ms': expected"),
    (("--latency", "2"), "latency '2': expected a time"),
    (("--memory-rate", "20"), "memory-rate '20': expected"),
    (("--dtype", "float16"), "dtype 'float16': expected one of float32, float64"),
    (("--algorithms", "magic"), "algorithms 'magic': expected one of textbook, openmpi"),
    (("--plot", "plan.xyz"), "plot plan.xyz: expected"),
    (("--hosts", "a,b"), "hosts: expected --measure"),
    (("--measure", "--rate", ""), "rate: needed too"),
    (("--measure", "--rate", "", "--hosts", "a:2"), "rate: needed too"),
    (("--measure", "--hosts", "a:0"), "host 'a:0': expected"),
])  # fmt: skip
def test_wrong_options_are_told(more: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, [*LINE, *more])
    assert done.exit_code == 2
    assert f"mpidl: {said}" in done.output
