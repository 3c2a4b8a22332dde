"""Where `mpidl run` stands, by the environment of a job. No scheduler is asked but for Flux's."""

from __future__ import annotations

import itertools
import os
import socket
from typing import TYPE_CHECKING

import pytest

from mpidl import cores
from mpidl.cli import allocation
from mpidl.cli.allocation import Allocation, choose, expand, find, per_node
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

OF_JOBS = ("SLURM_", "PBS_", "LSB_", "FLUX_", "NCPUS", "OMPI_COMM_", "PMI", "JSM_", "PALS_")
SLURM = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),1"}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scheduler's job, and four cores."""
    for name in set(os.environ):
        if name.startswith(OF_JOBS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cores, "available", lambda: 4)


def inside(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("n1", ["n1"]),
        ("n[01-03,7],gpu5", ["n01", "n02", "n03", "n7", "gpu5"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
        ("a.b,c-[1]", ["a.b", "c-1"]),
    ],
)
def test_lists_of_hosts(listed: str, names: list[str]) -> None:
    assert expand(listed) == names


def test_any_list_of_hosts(rng: np.random.Generator) -> None:
    """Written as SLURM does it: numbers with as many digits that follow each other are a range."""
    for _ in range(50):
        digits = int(rng.integers(1, 5))
        least, most = 10 ** (digits - 1), 10**digits - 1
        zeros = bool(rng.integers(2))
        picked = rng.integers(0 if zeros else least, most + 1, int(rng.integers(1, 30)))
        numbers = sorted(set(picked.tolist()))
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        spell = [f"{r[0]:0{digits}}" + (f"-{r[-1]:0{digits}}" if r[1:] else "") for r in runs]
        expected = [f"node{number:0{digits}}" for number in numbers]
        assert expand(f"node[{','.join(spell)}]") == expected
        assert expand(",".join(expected)) == expected


@pytest.mark.parametrize(
    "listed",
    ["n[1-", "n]1", "n[a-b]", "n[]", "n[3-1]", "n[1,,2]", "n[1-999999999]", "n[[1]]", "n[1][",
     "a[1-2000]b[1-2000]"],
)  # fmt: skip
def test_no_list_of_hosts(listed: str) -> None:
    with pytest.raises(InvalidArgument, match=r"expected such as n\[01-03,7\],gpu5"):
        expand(listed)


def test_numbers_of_nodes(rng: np.random.Generator) -> None:
    assert per_node("4(x2),3") == [4, 4, 3]
    assert [per_node(text) for text in ("", "x", "4(x2", "4(2)", "1,,2", "-1")] == [[]] * 6
    numbers = rng.integers(1, 4, 40).tolist()
    groups = [(n, len(list(same))) for n, same in itertools.groupby(numbers)]
    text = ",".join(f"{n}(x{count})" if count > 1 else str(n) for n, count in groups)
    assert per_node(text) == numbers


def test_no_allocation() -> None:
    assert find() is None
    assert choose(None, "") == (1, None, None, None, False)
    assert choose(3, "") == (3, None, None, None, False)


def test_hosts_by_name() -> None:
    assert choose(None, "a:4,b:2")[:2] == (6, {"a": 4, "b": 2})
    assert choose(5, "a:4,b:2")[:2] == (5, {"a": 4, "b": 1})
    assert choose(4, "a:4,b:2")[:2] == (4, {"a": 4})
    with pytest.raises(InvalidArgument, match=r"-n 7: --hosts a:4,b:2 has places for 6"):
        choose(7, "a:4,b:2")


def test_it_is_not_started_by_a_launcher_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun -n 4 mpidl run train.py`: four trainings of four ranks would write the same files."""
    inside(monkeypatch, **SLURM, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1")
    assert choose(None, "").ranks == 5
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    told = (
        r"srun has started mpidl run 4 times \(SLURM_STEP_NUM_TASKS=4\), and each would start all"
    )
    for ranks in (None, 1):
        with pytest.raises(InvalidArgument, match=told):
            choose(ranks, "")
    assert choose(None, "n1:2").ranks == 2  # who names the hosts knows where they stand


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, **SLURM, SLURM_JOB_CPUS_PER_NODE="8(x2),4", SLURM_GPUS_ON_NODE="2")
    cores = {"n1": 8, "n2": 8, "n3": 4}
    assert find() == Allocation("SLURM", {"n1": 2, "n2": 2, "n3": 1}, cores, 2)
    assert choose(None, "")[:3] == (5, {"n1": 2, "n2": 2, "n3": 1}, 4)
    assert choose(4, "")[:3] == (4, {"n1": 2, "n2": 2}, 8)
    assert choose(1, "")[:3] == (1, {"n1": 1}, 8)
    assert choose(10, "")[:2] == (10, {"n1": 4, "n2": 4, "n3": 2})  # as the cores are
    assert choose(20, "")[:2] == (20, cores)
    told = r"-n 21: the SLURM job has places for 20 \(n1:8,n2:8,n3:4\); ask for more .sbatch "
    told += r"--ntasks=21., or let ranks share cores: --hosts n1:7,n2:7,n3:7"
    with pytest.raises(InvalidArgument, match=told):
        choose(21, "")
    named = choose(None, "n2:3,n3:1")
    assert (named.ranks, named.cores, named.named) == (4, 4, True)
    assert choose(None, "x:3").cores is None


def test_a_step_on_one_node_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes are the job's and the tasks the step's: SLURM 22.05, srun -n1 in salloc -N2 -n4."""
    inside(monkeypatch, SLURM_JOB_NODELIST="t[0-1]", SLURM_TASKS_PER_NODE="1")
    inside(monkeypatch, SLURM_JOB_CPUS_PER_NODE="2(x2)")
    assert choose(None, "")[:2] == (4, {"t0": 2, "t1": 2})
    assert allocation.of_the_job() == {"SLURM_TASKS_PER_NODE": "2(x2)"}
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x2)")
    assert choose(None, "")[:2] == (2, {"t0": 1, "t1": 1})
    assert allocation.of_the_job() == {}


def test_slurm_that_tells_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, SLURM_JOB_NODELIST="n[1-3]", SLURM_TASKS_PER_NODE="2")
    with pytest.raises(InvalidArgument, match=r"SLURM_TASKS_PER_NODE=2, .*--hosts a:4,b:4"):
        find()
    assert choose(None, "a:2").ranks == 2


def test_this_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then launchers need no names, nor networks; and no more cores than the job has."""
    here = socket.gethostname()
    inside(monkeypatch, SLURM_JOB_NODELIST=here, SLURM_TASKS_PER_NODE="2")
    inside(monkeypatch, SLURM_JOB_CPUS_PER_NODE="2")
    assert choose(None, "")[:3] == (2, None, 2)
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "64")
    assert choose(None, "")[:3] == (2, None, 4)  # a container has fewer
    inside(monkeypatch, SLURM_JOB_NODELIST=f"{here},other", SLURM_TASKS_PER_NODE="2(x2)")
    assert choose(1, "")[:2] == (1, {here: 1})


def test_pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nodes"
    file.write_text("n1.x\nn1.x\nn2.x\nn1.x\n")
    inside(monkeypatch, PBS_NODEFILE=str(file), PBS_JOBID="1.server")
    assert find() == Allocation("PBS", {"n1.x": 3, "n2.x": 1})
    assert choose(None, "").cores is None
    monkeypatch.setenv("NCPUS", "8")
    assert choose(None, "")[:3] == (4, {"n1.x": 3, "n2.x": 1}, 8)
    with pytest.raises(InvalidArgument, match=r"the PBS job has places for 16 .*mpiprocs"):
        choose(17, "")
    for text in (None, ""):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(InvalidArgument, match=r"PBS_NODEFILE=.*nodes: .*--hosts a:4,b:4"):
            find()


@pytest.mark.parametrize("told", ["a 2 b 1", "", "a 2 b", "a 0", "a two"])
def test_lsf(told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("a\na\nb\n")
    inside(monkeypatch, LSB_JOBID="7", LSB_DJOB_HOSTFILE=str(tmp_path / "hosts"))
    inside(monkeypatch, LSB_MCPU_HOSTS=told)
    slots = {"a": 2, "b": 1}
    assert find() == Allocation("LSF", slots, slots)
    with pytest.raises(InvalidArgument, match="bsub -n 4"):
        choose(4, "")
    monkeypatch.delenv("LSB_JOBID")
    assert find() is None


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("2 8 0 f[1-2]", Allocation("Flux", {"f1": 4, "f2": 4}, {"f1": 4, "f2": 4}, 0)),
        ("2 96 8 f[1-2]", Allocation("Flux", {"f1": 4, "f2": 4}, {"f1": 48, "f2": 48}, 4)),
    ],
)
def test_flux(
    says: str, expected: Allocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path / "flux", f'echo "$*" > {tmp_path}/asked; echo "{says}"')
    inside(monkeypatch, PATH=f"{tmp_path}:/bin:/usr/bin", FLUX_URI="local:///run/flux", **SLURM)
    assert find() == expected  # Flux in a SLURM job: what is innermost
    assert (tmp_path / "asked").read_text().startswith("resource list -s up ")


@pytest.mark.parametrize("text", ["exit 1", "echo 0 0 0", "echo nonsense", None])
def test_flux_that_does_not_answer(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text:
        command(tmp_path / "flux", text)
    inside(monkeypatch, PATH=f"{tmp_path}:/bin:/usr/bin", FLUX_URI="local:///run/flux")
    with pytest.raises(InvalidArgument, match=r"flux.*--hosts a:4,b:4"):
        find()


def command(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
