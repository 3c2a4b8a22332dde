"""`mpidl doctor --hosts`: what is made of facts and measurements. Those are made up."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mpidl.cli import doctor, doctor_findings, doctor_host, doctor_hosts, doctor_pairs, launcher
from mpidl.cli.app import app
from mpidl.cli.doctor_findings import OK, PROBLEM, WARNING, Finding
from mpidl.errors import MpidlError, MPINotFound

GIB = 1 << 30
ONE: dict[str, Any] = {
    "host": "a",
    "python": "3.11.7",
    "executable": "/opt/bin/python",
    "mpidl": "0.1.0",
    "packages": {"numpy": "2.4.6", "mpi4py": "4.1.2"},
    "mpi": "Open MPI v5.0.11",
    "cores": 64,
    "shared_memory": {"size": 64 * GIB, "free": 60 * GIB},
    "open_files": 1 << 16,
    "locked_memory": None,
    "interfaces": {},
    "rdma": [],
    "gpus": None,
}
GPUS = {"names": ["A100"] * 2, "apart": []}


def facts(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Three hosts; `c={"python": "3.10.1"}` changes what the third one has."""
    return {name: {**copy.deepcopy(ONE), "host": name, **changes.get(name, {})} for name in "abc"}


def bad(found: list[Finding]) -> list[tuple[str, str]]:
    assert all(len(line) <= 80 for one in found for line in one.lines.splitlines())
    assert all(one.next for one in found if one.state != OK)
    return [(one.state, one.text) for one in found if one.state != OK]


def test_hosts_that_are_alike() -> None:
    found = doctor_findings.of_hosts(facts(), {})
    assert bad(found) == []
    assert [one.lines for one in found] == [
        "ok      reach: 3 hosts, without a password",
        "ok      Python: 3.11.7 everywhere",
        "ok      mpidl: 0.1.0 everywhere",
        "ok      MPI: Open MPI v5.0.11 everywhere",
        "ok      cores: 64 everywhere",
        "ok      packages alike: numpy 2.4.6, mpi4py 4.1.2",
        "ok      /dev/shm: 60 GiB free, or more",
        "ok      open files: 65536 at most",
        "ok      locked memory: no limit (counts for RDMA only)",
        "ok      GPUs: no GPU",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"python": "3.10.1"}, (PROBLEM, "Python: c: 3.10.1, a: 3.11.7")),
        ({"mpidl": "0.0.9"}, (PROBLEM, "mpidl: c: 0.0.9, a: 0.1.0")),
        ({"mpi": "MPICH 4.3"}, (PROBLEM, "MPI: c: MPICH 4.3, a: Open MPI v5.0.11")),
        ({"mpi": None}, (PROBLEM, "MPI: c: none, a: Open MPI v5.0.11")),
        ({"cores": 8}, (WARNING, "cores: c: 8, a: 64")),
        (
            {"packages": {"numpy": "2.0.0", "mpi4py": "4.1.2"}},
            (WARNING, "numpy: c: 2.0.0, a: 2.4.6"),
        ),
        (
            {"packages": {"mpi4py": "4.1.2", "numpy": "2.4.6", "torch": "2.6"}},
            (WARNING, "torch: c: 2.6, a: none"),
        ),
        (
            {"shared_memory": {"size": 1 << 26, "free": 1 << 25}},
            (WARNING, "c: 32 MiB of 64 MiB free in /dev/shm"),
        ),
        ({"shared_memory": None}, (WARNING, "c: no /dev/shm")),
        ({"open_files": 256}, (WARNING, "c: at most 256 open files")),
        ({"open_files": None}, None),
        ({"locked_memory": 1 << 23}, None),  # no RDMA
        (
            {"locked_memory": 1 << 23, "rdma": ["mlx5_0"]},
            (WARNING, "c: locked memory is 8 MiB, and there is RDMA"),
        ),
        ({"gpus": GPUS}, (WARNING, "GPUs: c: 2, a: 0")),
        (
            {"gpus": "ImportError: no CuPy"},
            (WARNING, "c: a driver, but no GPU for CuPy: ImportError: no CuPy"),
        ),
    ],
)
def test_one_host_unlike_the_others(
    changes: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    found = doctor_findings.of_hosts(facts(c=changes), {})
    assert bad(found) == ([] if expected is None else [expected])


def test_gpus_that_cannot_read_each_other() -> None:
    apart = {"names": ["A100"] * 3, "apart": [[0, 1], [0, 2]]}
    found = doctor_findings.of_hosts(facts(a={"gpus": apart}, b={"gpus": apart}), {})
    texts = [text for _, text in bad(found)]
    told = "GPUs 0 and 1 cannot read each other's memory, and 1 more pairs"
    assert texts == [f"a: {told}", f"b: {told}", "GPUs: c: 0, a: 3"]


def test_failed_hosts_are_named_and_the_others_judged() -> None:
    failed = {"d": ("not reached: No route to host", "ssh d true must end well")}
    found = doctor_findings.of_hosts(facts(), failed)
    assert bad(found) == [(PROBLEM, "d: not reached: No route to host")]
    assert found[1].text == "Python: 3.11.7 everywhere"
    assert [one.state for one in doctor_findings.of_hosts({}, failed)] == [PROBLEM]


def test_names_of_many_hosts_fit() -> None:
    names = [f"node{i:03}" for i in range(64)]
    many = {name: {**ONE, "cores": 64 if i % 2 else i} for i, name in enumerate(names)}
    found = doctor_findings.of_hosts(many, {})
    assert len(bad(found)) == 32
    assert doctor_findings.several(names) == "node000, node001, node002 and 61 more"
    assert doctor_findings.several(names[:4]) == "node000, node001, node002, node003"
    long = Finding(WARNING, "one host " * 12, "do this " * 20)
    assert max(map(len, long.lines.splitlines())) <= 80
    words = ["warning", *["one", "host"] * 12, "next:", *["do", "this"] * 20]
    assert long.lines.split() == words


def measured(*rates: float, **changes: Any) -> dict[str, Any]:
    """What three hosts have measured: bandwidths a - b, a - c, b - c in Gbit/s."""
    pairs = [(0, 1), (0, 2), (1, 2)]
    return {
        "pairs": [(a, b, 1e-5, 1e9 * rate) for (a, b), rate in zip(pairs, rates, strict=True)],
        "left": 0,
        "clocks": [(0.0, 0.0), (1e-4, 2e-5), (-2e-4, 2e-5)],
        "allreduce": {"bytes": 1 << 22, "seconds": 0.01, "wire_seconds": 0.008},
        "names": ["a", "b", "c"],
        "traffic": [{"eth0": 10_000_000, "lo": 100}] * 3,
        "moved": [9_000_000] * 3,
        **changes,
    }


def network(found: dict[str, Any], hosts: dict[str, dict[str, Any]] | None = None) -> list[Finding]:
    return doctor_findings.of_network(["a", "b", "c"], hosts or facts(), found)


def test_a_network_that_is_well() -> None:
    found = network(measured(9.4, 9.3, 9.4))
    assert bad(found) == []
    assert [one.lines for one in found] == [
        "ok      clocks: at most 200 us apart (+-20 us)",
        "ok      latency: 10 us to 10 us for 8 bytes, 3 pairs",
        "ok      bandwidth: 9.30 Gbit/s to 9.40 Gbit/s, 3 pairs",
        "ok      allreduce: 4 MiB in 10 ms, 1.2 times the slowest wire's",
        "ok      interfaces that MPI uses: eth0 everywhere",
    ]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((9.4, 0.94, 0.93), ["c: 0.94 Gbit/s at best, the others 9.40 Gbit/s"]),
        ((9.4, 9.4, 0.0094), ["b - c: 9.4 Mbit/s, other pairs 9.40 Gbit/s"]),
        ((0.1, 0.1, 0.1), ["bandwidth: 0.10 Gbit/s to 0.10 Gbit/s, 3 pairs"]),
        ((9.4, 5.0, 6.0), []),
    ],
)
def test_what_is_slow_is_named(rates: tuple[float, ...], expected: list[str]) -> None:
    assert [text for _, text in bad(network(measured(*rates)))] == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"clocks": [(0, 0), (3.5, 0.1), (-90.0, 0.1)]},
            ["b: its clock is 3.5 s ahead of a's (+-0.1 s)",
             "c: its clock is 90 s behind a's (+-0.1 s)"],
        ),
        ({"clocks": [(0, 0), (3.5, 3), (0, 0)]}, []),  # nobody knows
        (
            {"pairs": [(0, 1, 1e-5, 9e9), (0, 2, 4e-4, 9e9), (1, 2, 1e-5, 9e9)]},
            ["a - c: 400 us for 8 bytes"],
        ),
        (
            {"pairs": [(a, b, 2e-3, 9e9) for a, b in ((0, 1), (0, 2), (1, 2))]},
            ["latency: 2 ms for 8 bytes, in the median"],
        ),
        (
            {"allreduce": {"bytes": 1 << 22, "seconds": 0.08, "wire_seconds": 0.008}},
            ["allreduce: 4 MiB in 80 ms, 10.0 times the slowest wire's"],
        ),
        ({"left": 5}, []),
        ({"pairs": []}, []),
    ],
)  # fmt: skip
def test_other_findings_of_the_network(changes: dict[str, Any], expected: list[str]) -> None:
    found = network(measured(9, 9, 9, **changes))
    assert [text for _, text in bad(found)] == expected
    left = [one.text for one in found if one.text.endswith("; 5 not measured in time")]
    assert len(left) == (changes == {"left": 5})


def test_interfaces_that_are_used() -> None:
    speeds = {"interfaces": {"eth0": 1e9, "ib0": 1e11}}
    found = network(measured(9, 9, 9), facts(b=speeds))
    assert [text for _, text in bad(found)] == ["b: MPI used eth0, ib0 is faster"]
    traffic = [{"eth0": 9_000_000}, {"ib0": 9_000_000}, {"eth0": 90_000}]  # the last by RDMA
    found = network(measured(9, 9, 9, traffic=traffic), facts(b=speeds))
    assert bad(found) == []
    assert [one.text for one in found[-3:]] == [
        "interfaces that MPI uses: eth0 on a",
        "interfaces that MPI uses: ib0 on b",
        "interfaces that MPI uses: none that the kernel counts on c",
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 64])
def test_each_pair_meets_once_and_those_of_a_round_are_apart(count: int) -> None:
    every = doctor_pairs.rounds(count)
    pairs = sorted(pair for met in every for pair in met)
    assert pairs == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert len(every) == (count - 1 + count % 2 if count > 1 else 0)
    for met in every:
        ranks = [rank for pair in met for rank in pair]
        assert len(set(ranks)) == len(ranks)


def test_the_clock_of_another_host(rng: np.random.Generator) -> None:
    """Whatever the two ways take, the true offset lies within the uncertainty."""
    for _ in range(100):
        true, start, samples = float(rng.normal(0, 5)), 1000.0, []
        for _ in range(5):
            there, back = rng.exponential(1e-3, 2).tolist()
            samples.append((start, start + there + true, start + there + back))
            start += 1
        ahead, uncertainty = doctor_pairs.offset(samples)
        assert abs(ahead - true) <= uncertainty + 1e-9
        assert uncertainty == pytest.approx(min(c - a for a, _, c in samples) / 2, abs=1e-9)


def test_traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = "1000 9 0 0 0 0 0 0 200 9 0 0 0 0 0 0"
    (tmp_path / "dev").write_text(f"head\nhead\n    lo: {numbers}\n  eth0:{numbers}\n")
    counters = tmp_path / "rdma/mlx5_0/ports/1/counters"
    counters.mkdir(parents=True)
    (counters / "port_xmit_data").write_text("10\n")
    (counters / "port_rcv_data").write_text("5\n")
    (counters / "port_xmit_packets").write_text("7\n")
    monkeypatch.setattr(doctor_pairs, "NET", tmp_path / "dev")
    monkeypatch.setattr(doctor_pairs, "RDMA", tmp_path / "rdma")
    assert doctor_pairs.traffic() == {"lo": 1200, "eth0": 1200, "mlx5_0": 60}


def test_facts_of_this_host() -> None:
    found = json.loads(json.dumps(doctor_host.facts()))
    assert set(found) == set(ONE)
    assert found["packages"]["numpy"] == np.__version__
    assert found["shared_memory"]["size"] >= found["shared_memory"]["free"] > 0
    doctor_findings.of_hosts({"here": found}, {})


def test_gpus_by_a_stand_in() -> None:
    runtime = types.SimpleNamespace(
        getDeviceCount=lambda: 3,
        getDeviceProperties=lambda i: {"name": f"GPU{i}".encode()},
        deviceCanAccessPeer=lambda i, j: int((i, j) != (0, 2)),
    )
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    assert doctor_host.gpus(cupy) == {"names": ["GPU0", "GPU1", "GPU2"], "apart": [[0, 2]]}


@pytest.mark.parametrize(
    ("errors", "reached", "expected"),
    [
        ("ssh: connect to host b port 22: No route to host\n-----\nPRTE has lost\n", False,
         "not reached: ssh: connect to host b port 22: No route to host"),
        ("b: Permission denied (publickey,password).\n", False,
         "not reached: b: Permission denied (publickey,password)."),
        ("", False, "not reached: "),
        ("bash: line 1: /opt/bin/prted: No such file or directory\n-----\n", False,
         "no prted there"),
        ("/opt/python: Error while finding module specification for 'mpidl.cli.doctor_host' "
         "(ModuleNotFoundError: No module named 'mpidl')\n", True, "no mpidl in "),
        ("/bin/sh: 1: exec: /opt/python: not found\n", True, "no Python at "),
        ("Traceback\nImportError: libm.so.6\n", True, "its Python failed: ImportError: libm.so.6"),
    ],
)  # fmt: skip
def test_why_a_host_gave_no_facts(errors: str, reached: bool, expected: str) -> None:
    why, then = doctor_hosts.why("b", errors, reached=reached)
    assert why.startswith(expected)
    assert then


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is found: by host, and under "job". This machine itself is well."""
    told: dict[str, Any] = {**facts(), "job": measured(9.4, 9.4, 9.4)}
    library = launcher.Library("mpich", "MPICH 4.3", None, "/opt/bin/mpiexec")

    def measure(_: object, names: list[str], tries: int) -> dict[str, Any]:
        told["asked"] = names
        if isinstance(told["job"], MpidlError):
            raise told["job"]
        return told["job"]  # type: ignore[no-any-return]

    monkeypatch.setattr(launcher, "find", lambda: library)
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Report({"mpidl": "0.1.0"}))
    monkeypatch.setattr(doctor_hosts, "_look", lambda _, name: told[name])
    monkeypatch.setattr(doctor_hosts, "_measure", measure)
    return told


def doctor_says(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", "--hosts", "a,b,c", *options])
    return result.exit_code, result.stdout


def test_all_is_well(hosts: dict[str, Any]) -> None:
    status, text = doctor_says()
    assert status == 0, text
    assert text.splitlines()[-1] == "ready   mpidl run --hosts a,b,c SCRIPT will work"
    assert "ok      latency: 10 us to 10 us for 8 bytes, 3 pairs\n" in text
    assert hosts["asked"] == ["a", "b", "c"]


def test_one_host_is_not_reached(hosts: dict[str, Any]) -> None:
    hosts["b"] = ("not reached: No route", "ssh b true must end well")
    hosts["job"] = {**measured(9, 9, 9), "pairs": [(0, 1, 1e-5, 9e9)], "names": ["c", "a"]}
    for key in ("clocks", "traffic", "moved"):
        hosts["job"][key] = hosts["job"][key][:2]
    status, text = doctor_says()
    assert status == 1
    assert "problem b: not reached: No route\n        next: ssh b true must end well\n" in text
    assert "ready" not in text
    assert hosts["asked"] == ["a", "c"], "the others are still looked at"


def test_another_mpi_takes_no_part(hosts: dict[str, Any]) -> None:
    hosts["a"]["mpi"] = "MPICH 4.3"
    hosts["job"] = MpidlError("it ended with status 1")
    status, text = doctor_says("--json")
    told = json.loads(text)
    assert status == 1 and hosts["asked"] == ["b", "c"]
    assert set(told) == {"facts", "problems", "advice", "healthy", "hosts", "measured", "findings"}
    assert told["healthy"] is False and told["measured"] is None
    assert len(told["problems"]) == 2
    assert told["problems"][0].startswith("MPI: a: MPICH 4.3, b: Open MPI v5.0.11; load the same")
    assert told["problems"][1].startswith("no job over the hosts: it ended with status 1; ")
    assert told["findings"][0] == {
        "state": "ok",
        "text": "reach: 3 hosts, without a password",
        "next": "",
    }


def test_warnings_are_advice(hosts: dict[str, Any]) -> None:
    hosts["job"] = measured(9.4, 0.94, 0.94)
    status, text = doctor_says("--json")
    told = json.loads(text)
    assert status == 0 and told["healthy"] is True
    (advice,) = told["advice"]
    assert advice.startswith("c: 0.94 Gbit/s at best, the others 9.40 Gbit/s; ethtool on c: ")


def test_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> launcher.Library:
        raise MPINotFound("no MPI")

    monkeypatch.setattr(launcher, "find", find)
    found = doctor_hosts.examine(["a"])
    assert found.told(PROBLEM) == ["no launcher for other hosts; no MPI"]


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Return a function that makes a launcher of a shell script."""

    def make(text: str) -> launcher.Library:
        path = tmp_path / "mpiexec"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return launcher.Library("mpich", "MPICH 4.3", None, str(path))

    return make


def test_what_a_launcher_brings(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.dumps(ONE)
    assert doctor_hosts._look(script(f"echo mpidl-reached; echo '{told}'"), "b") == ONE
    why, _ = doctor_hosts._look(script("echo mpidl-reached; echo '{'; exit 1"), "b")
    assert why.startswith("its Python failed")
    assert doctor_hosts._measure(script("echo hello; echo '{\"pairs\": []}'"), ["a", "b"]) == {
        "pairs": []
    }
    with pytest.raises(MpidlError, match=r"^lost$"):
        doctor_hosts._measure(script("echo lost >&2; exit 1"), ["a", "b"], 2)
    monkeypatch.setattr(doctor_hosts, "HOST_SECONDS", 0.3)
    why, then = doctor_hosts._look(script("sleep 60"), "b")
    assert why == "no answer: no end within 0.3 s"
    assert then == "ssh b true must end without a question"


def test_a_job_is_tried_again(script: Any, tmp_path: Path) -> None:
    once = f"test -e {tmp_path}/x || {{ touch {tmp_path}/x; exit 1; }}; echo '{{\"left\": 0}}'"
    assert doctor_hosts._measure(script(once), ["a", "b"], 2) == {"left": 0}
