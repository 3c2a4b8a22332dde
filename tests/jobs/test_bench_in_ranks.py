"""`mpidl bench` across ranks: that it measures what it says, and finds out what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mpidl.bench import allreduce, step, step_breakdown, step_ranks, stragglers
from mpidl.strategies import own
from tests import job
from tests.jobs.test_failures import only_mpich

BENCH = (sys.executable, "-m", "mpidl", "bench")

# One strategy that is right, and some that are off in one thing. Each prints what it led to.
OFF = """
import importlib.util
import numpy as np

find_spec, absent = importlib.util.find_spec, ("torch", "horovod")
importlib.util.find_spec = lambda name, *rest: None if name in absent else find_spec(name, *rest)

import mpidl
from mpidl.bench import allreduce_ranks, step_ranks
from mpidl.strategies import STRATEGIES

class Right:
    shared = False
    def __init__(self, world): self.world = world
    def allocate(self, size, dtype, xp, layout=()):
        return xp.zeros(size, dtype), xp.zeros(size, dtype)
    def owned(self, size):
        return slice(size * self.world.rank // self.world.size,
                     size * (self.world.rank + 1) // self.world.size)
    def reduce(self, grad, weight):
        mean = sum(self.world.gather(grad * weight))
        part = self.owned(grad.size)
        yield part, mean[part]
    def share(self, param):
        param[:] = np.concatenate(self.world.gather(param[self.owned(param.size)]))
    def total(self, values): return self.world.sum(values)
    def close(self): pass

class SumOnOneRank(Right):
    def reduce(self, grad, weight):
        for part, mean in super().reduce(grad, weight):
            yield part, mean * (self.world.size if self.world.rank == 1 else 1)

class OneNumber(Right):
    def reduce(self, grad, weight):
        for part, mean in super().reduce(grad, weight):
            if self.world.rank == self.world.size - 1:
                mean[-1] += 0.01
            yield part, mean

class SameWeights(Right):
    def reduce(self, grad, weight):
        return super().reduce(grad, 1 / self.world.size)

class SharesNothing(Right):
    def share(self, param): self.world.barrier()

class TooFew(Right):
    def reduce(self, grad, weight):
        return super().reduce(np.where(self.world.rank == 0, 0, grad), weight)

class NoMemory(Right):
    def __init__(self, world): raise mpidl.errors.NoSharedMemory("not here")

world = mpidl.init()
measures = {
    "allreduce": lambda name: allreduce_ranks.measure(world, [40, 4000], 1),
    "step": lambda name: step_ranks.measure(world, ["mlp"], 1, [name, "ddp"], 7, False),
}
for kind, measure in measures.items():
    for cls in (Right, SumOnOneRank, OneNumber, SameWeights, SharesNothing, TooFew, NoMemory):
        if (kind, cls) == ("step", NoMemory):
            continue
        for name in set(STRATEGIES) - {"allreduce"}:
            del STRATEGIES[name]
        STRATEGIES["off"] = cls
        try:
            report = measure("off")
        except mpidl.MpidlError as error:
            told = str(error)
        else:
            told = f"{len(report['rows'])} rows, absent: {sorted(report['absent'])}"
        print(kind, cls.__name__, told.replace("\\n", " "), sep=": ")
"""


@only_mpich
def test_a_strategy_that_is_off_is_found_out(mpi: str, tmp_path: Path) -> None:
    result = job.run(mpi, 3, job.script(tmp_path, OFF), OMP_NUM_THREADS="1")
    assert result.status == 0, result
    told: dict[tuple[str, str], set[str]] = {}
    for line in result.output.splitlines():
        kind, name, text = line.split(": ", 2)
        told.setdefault((kind, name), set()).add(text)
    assert all(len(texts) == 1 for texts in told.values()), result  # the same on every rank
    found = {key: min(texts) for key, texts in told.items()}
    assert found.pop(("allreduce", "Right")) == "12 rows, absent: ['gloo', 'horovod']"
    assert found.pop(("step", "Right")) == "2 rows, absent: ['ddp', 'torch_local']"
    without = "8 rows, absent: ['gloo', 'horovod', 'off']"
    assert found.pop(("allreduce", "NoMemory")) == without
    assert len(found) == 10, result
    for (kind, _), text in found.items():
        wrong = "parameter" if kind == "step" else "off (average) of"
        assert "is wrong by" in text and wrong in text, result


def test_allreduce_reports_every_method(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    sizes = ("--sizes", "20,4KiB", "--turns", "3")
    line = (*BENCH, "allreduce", "-n", "2", *sizes, "--json", "--plot", str(plot))
    result = job.execute(None, *line)
    assert result.status == 0, result
    report = json.loads(result.output)
    strategies = {(name, what) for name in own() for what in ("average", "reduce")}
    others = {("mpi_allreduce", "average"), ("gloo", "average"), ("memory_bound", "bound")}
    expected = {(*each, size) for each in strategies | others for size in (20, 4096)}
    found = {(row["method"], row["what"], row["bytes"]): row for row in report["rows"]}
    horovod = {key for key in found if key[0] == "horovod"}
    assert set(found) - horovod == expected
    assert bool(horovod) != ("horovod" in report["absent"])
    for row in report["rows"]:
        assert row["ranks"] == 2
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"] < 10
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
    assert report["machine"]["settings"]["OMP_NUM_THREADS"] == "1"
    assert report["machine"]["mpi"].startswith("Open MPI")
    assert plot.stat().st_size > 1000
    allreduce.show(report)


def test_step_reports_every_method() -> None:
    line = (*BENCH, "step", "-n", "2", "--models", "mlp", "--turns", "1", "--json")
    result = job.execute(None, *line)
    assert result.status == 0, result
    report = json.loads(result.output)
    rows = {row["method"]: row for row in report["rows"]}
    absent = report["absent"].keys() | {step_ranks.BLOCKING, "nccl"}
    assert report["absent"].keys() <= {"horovod"}  # it is built by hand
    assert list(rows) == [name for name in step.METHODS if name not in absent]
    for method, row in rows.items():
        assert (row["model"], row["ranks"], row["samples"]) == ("mlp", 2, 256)
        base = rows["torch_local" if method in ("ddp", "horovod", "torch_local") else "local"]
        assert row["over_local"] == pytest.approx(row["median_ms"] / base["median_ms"])
        assert ("breakdown_ms" in row) == (method in (*own(), "auto"))
        if "breakdown_ms" in row:
            assert list(row["breakdown_ms"]) == list(step_breakdown.PHASES)
            assert min(row["breakdown_ms"].values()) >= 0
            assert row["breakdown_ms"]["compute"] > 0
    assert rows["auto"]["strategy"] == "hierarchical"
    step.show(report)


MEMORY = """
import json
from mpidl.bench import jobs
for method in ("hierarchical", "allreduce"):
    print(json.dumps(jobs.run("mpidl.bench.step_memory", 3, model="mlp", method=method)))
"""


def test_memory_of_all_ranks(tmp_path: Path) -> None:
    """By the arrays alone: 5 of 9 copies where they are shared, else 9 of 9."""
    result = job.execute(None, sys.executable, job.script(tmp_path, MEMORY))
    assert result.status == 0, result
    shared, private = (json.loads(line) for line in result.output.splitlines())
    assert (shared["method"], shared["ranks"]) == ("hierarchical", 3)
    assert 5 / 9 < shared["over_private"] < private["over_private"]
    assert 1 < private["over_private"] < 1.6  # not the libraries, which were there before
    copies = {row["pss_mb"] / row["over_private"] for row in (shared, private)}
    parameters = 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10
    assert copies == pytest.approx([9 * 4 * parameters / 1e6] * len(copies))


@only_mpich
def test_scaling_starts_one_job_for_each_number_of_ranks(mpi: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    line = (*BENCH, "scaling", "--ranks", "1,2", "--turns", "1", "--json", "--plot", str(plot))
    result = job.execute(mpi, *line)
    assert result.status == 0, result
    rows: list[dict[str, Any]] = json.loads(result.output)["rows"]
    found = [(row["kind"], row["ranks"], row["samples"]) for row in rows]
    strong, weak = [("strong", 1, 256), ("strong", 2, 256)], [("weak", 1, 128), ("weak", 2, 256)]
    assert found == strong + weak
    assert all(row["median_ms"] > 0 for row in rows)
    assert plot.stat().st_size > 1000


@only_mpich
def test_what_ranks_say_when_they_fail_is_passed_on(mpi: str, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "from mpidl.bench import jobs\n"
        "print('{}')\n"
        "def measure(world, leaf):\n"
        "    if world.rank == 1:\n"
        "        raise ValueError(f'no {leaf} here')\n"
        "    world.barrier()\n"
        "jobs.in_ranks(measure)\n"
    )
    text = "from mpidl.bench import jobs\njobs.run('failing', 2, leaf='green tea')\n"
    script = job.script(tmp_path, text)
    result = job.execute(mpi, sys.executable, script, cwd=tmp_path)
    assert result.status == 1, result
    assert "MpidlError: failing failed on 2 ranks" in result.errors
    assert "ValueError: no green tea here" in result.errors


def test_only_the_report_reaches_standard_output(mpi: str, tmp_path: Path) -> None:
    (tmp_path / "greeting.py").write_text(
        "import os\n"
        "from mpidl.bench import jobs\n"
        "def measure(world):\n"
        "    print('a greeting of Python', flush=True)\n"
        "    os.write(1, b'and one of C' * 1000)\n"
        "    return {'ranks': world.size, 'long': 'x' * 100_000}\n"
        "jobs.in_ranks(measure)\n"
    )
    text = "from mpidl.bench import jobs\nprint(jobs.run('greeting', 2)['ranks'])\n"
    script = job.script(tmp_path, text)
    result = job.execute(mpi, sys.executable, script, cwd=tmp_path)
    assert (result.status, result.output) == (0, "2\n"), result


# Four ranks of this machine that take themselves for two nodes.
TWO_NODES = """
import dataclasses, importlib.util, json, sys
find_spec, absent = importlib.util.find_spec, ("torch", "horovod")
importlib.util.find_spec = lambda name, *rest: None if name in absent else find_spec(name, *rest)

import mpidl
from mpidl import codecs
from mpidl.bench import allreduce_ranks, step_ranks, timing, wire
from mpidl.world import World

wire.MIN_SECONDS = timing.MIN_SECONDS_OF_WIRE = 1e-3
usual = World.of

def of(MPI, comm, **known):
    world = usual(MPI, comm, **known)
    if comm.size < 4:
        return world
    node, nodes = world.rank // 2, world.local.Split(world.rank // 2)
    members = (0, 1), (2, 3)
    return dataclasses.replace(world, local_rank=nodes.rank, local_size=2, node=node, nodes=2,
                               members=members, local=nodes)

World.of = of
world = mpidl.init()
given = json.loads(sys.argv[1])
measures = {"allreduce": allreduce_ranks.measure, "step": step_ranks.measure}
reports = {kind: measure(world, **given[kind]) for kind, measure in measures.items()}

class TooMuch:
    feedback = False
    def __str__(self): return "too much"
    def nbytes(self, size): return 4 * size
    def encode(self, values, message): message.view(values.dtype)[:] = values * 1.05
    def decode(self, message, values): values[:] = message.view(values.dtype)

codecs.CODECS["bf16"] = TooMuch
try:
    step_ranks.measure(world, ["mlp"], 1, [], 9, False, ["bf16"])
except mpidl.MpidlError as error:
    reports["wrong"] = str(error)
if world.rank == 0:
    print(json.dumps(reports))
"""


@pytest.mark.soak
@only_mpich
def test_between_nodes(mpi: str, tmp_path: Path) -> None:
    codecs, nbytes = ["bf16", "int8", "topk", "powersgd"], 40_000
    few = {"models": ["mlp"], "samples": 9, "methods": ["auto", step_ranks.BLOCKING]}
    given = {
        "allreduce": {"sizes": [nbytes], "turns": 2, "codecs": codecs},
        "step": {**few, "turns": 1, "codecs": codecs},
    }
    script = job.script(tmp_path, TWO_NODES)
    result = job.run(mpi, 4, script, json.dumps(given), OMP_NUM_THREADS="1", timeout=100)
    assert result.status == 0, result
    found = json.loads(result.output)
    encoded = [f"hierarchical+{codec}" for codec in codecs]
    report = found["allreduce"]
    rows = {(row["method"], row["what"]): row for row in report["rows"]}
    ours = {(name, what) for name in (*own(), *encoded) for what in ("average", "reduce")}
    bounds = {("memory_bound", "bound"), ("wire_bound", "bound")}
    assert set(rows) == {*ours, *bounds, ("mpi_allreduce", "average")}
    wire = rows["wire_bound", "bound"]
    assert report["wire"]["measured"]
    assert wire["median_s"] == pytest.approx(nbytes * 8 / (report["wire"]["gbit_per_s"] * 1e9))
    for row in rows.values():
        assert row["over_wire"] == pytest.approx(row["median_s"] / wire["median_s"])
    for what in ("average", "reduce"):  # of 4 bytes a number; half of them go there, half come back
        sent = {name: rows[name, what].get("wire_bytes") for name in (*encoded, "ring")}
        plain = rows["hierarchical", what]["wire_bytes"]  # sums alone go to their owners
        assert plain == pytest.approx(nbytes if what == "average" else nbytes // 2, abs=64)
        assert (sent["hierarchical+bf16"], sent["ring"]) == (nbytes // 2, None)
        assert nbytes // 4 < sent["hierarchical+int8"] < nbytes // 3
        assert sent["hierarchical+topk"] < nbytes // 20
        assert sent["hierarchical+powersgd"] < nbytes // 4
    unchecked = ["hierarchical+topk", "hierarchical+powersgd"]
    assert list(report["unchecked"]) == unchecked
    allreduce.show(report)
    report = found["step"]
    rows = {row["method"]: row for row in report["rows"]}
    assert set(rows) == {"local", *encoded, *few["methods"]}
    assert list(report["unchecked"]) == unchecked
    for name in encoded:
        assert rows[name]["strategy"] == "hierarchical"
        assert rows[name]["breakdown_ms"]["reduce"] > 0
    step.show({**report, "memory": []})
    assert "hierarchical+bf16, parameter" in found["wrong"]
    assert "is wrong by" in found["wrong"]


def test_hosts_are_where_the_ranks_run(mpi: str) -> None:
    """One host, this one: on one node there is nothing more to measure."""
    where = ("--hosts", "localhost:2", "--codecs", "bf16", "--rate", "1gbit")
    result = job.execute(
        mpi, *BENCH, "allreduce", *where, "--sizes", "8B", "--turns", "1", "--json"
    )
    assert result.status == 0, result
    report = json.loads(result.output)
    assert {row["ranks"] for row in report["rows"]} == {2}
    assert report["absent"]["hierarchical+bf16"] == "nothing travels on one node"
    assert "wire" not in report and "over_wire" not in report["rows"][0]


def test_step_in_torch() -> None:
    methods = ("local", "auto", "sharded", "ddp")
    line = (*BENCH, "step", "-n", "2", "--framework", "torch", "--models", "mlp", "--samples", "10")
    result = job.execute(None, *line, "--methods", ",".join(methods), "--turns", "2", "--json")
    assert result.status == 0, result
    report = json.loads(result.output)
    found = {row["method"]: row for row in report["rows"]}
    assert set(found) == set(methods)
    assert found["auto"]["strategy"] == "hierarchical"
    for row in report["rows"]:
        assert row["local"] == "local"
        assert row["samples"] == 10
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
    step.show(report)


def test_what_bench_step_does_not_know() -> None:
    for options in (("--framework", "caffe"), ("--framework", "torch", "--models", "deep")):
        result = job.execute(None, *BENCH, "step", *options)
        assert result.status == 2, result
        assert "expected one of" in " ".join(result.errors.split())


def test_a_slow_rank_costs_the_others_nothing_where_nobody_waits() -> None:
    report = stragglers.run(2, steps=20)
    rows = {row["method"]: row for row in report["rows"]}
    assert set(rows) == {"asynchronous", "parameter_server", "allreduce"}
    assert rows["allreduce"]["kept"] < rows["asynchronous"]["kept"]  # 0.2 and about 1
    stragglers.show(report)
    result = job.execute(None, *BENCH, "stragglers", "-n", "1")
    assert result.status == 2 and "2 ranks or more" in " ".join(result.errors.split()), result


def test_start() -> None:
    result = job.execute(None, *BENCH, "start", "-n", "3", "--turns", "1")
    assert result.status == 0, result
    assert result.output.startswith("3 ranks, 5 steps with hierarchical: ")
