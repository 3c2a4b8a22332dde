"""Cores, threads and GPUs of the ranks of a node: who gets which, and what is told of clashes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from mpidl import array, binding, config, cores
from mpidl.binding import BindingWarning, Seat
from mpidl.errors import InvalidArgument

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def seats(*lists: str, **more: object) -> list[Seat]:
    return [Seat(frozenset(cores.listed(text)), **more) for text in lists]  # type: ignore[arg-type]


def smt(packages: int, per_package: int) -> dict[int, cores.Place]:
    """A machine with two hyperthreads a core, numbered as Linux does: second ones at the end."""
    count = packages * per_package
    place = [(p, p, c) for p in range(packages) for c in range(per_package)]
    return {cpu: place[cpu % count] for cpu in range(2 * count)}


@pytest.mark.parametrize("text", ["", "0", "0-3", "0,2-3,8", "1,3,5"])
def test_lists_of_cpus(text: str) -> None:
    assert cores.told(cores.listed(text)) == text
    assert cores.listed(" 7,0-2\n") == {0, 1, 2, 7}


def test_random_lists_of_cpus(rng: np.random.Generator) -> None:
    cpus = set(rng.integers(0, 300, rng.integers(1, 200)).tolist())
    assert cores.listed(cores.told(cpus)) == cpus


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"": "max 100000"}, None),
        ({"": "250000 100000"}, 2),
        ({"": "50000 100000"}, 1),
        ({"": "what"}, None),
        ({"": "1 0"}, None),
        ({"a/b": "300000 100000"}, 3),
        ({"a": "200000 100000", "a/b": "300000 100000"}, 2),
        ({"": "max 100000", "a": "max 100000", "a/b": "400000 100000"}, 4),
        ({"c": "100000 100000"}, None),  # of others
    ],
)
def test_quotas_of_all_groups_above_count(
    files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name / "cpu.max").write_text(f"{text}\n")
    (tmp_path / "own").write_text("3:cpuset:/\n0::/a/b\n")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "own")
    assert cores.quota() == expected
    (tmp_path / "own").write_text("0::/../x\n")  # moved out of its namespace
    assert cores.quota() == (expected if list(files) == [""] else None)


def test_the_topology_of_this_machine() -> None:
    found = cores.topology()
    assert os.sched_getaffinity(0) <= set(found)


def test_a_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, (node, package, core) in {0: (0, 0, 5), 1: (1, 1, 5), 2: (0, 0, 5)}.items():
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/node{node}").mkdir()
        (tmp_path / f"cpu{cpu}/topology/physical_package_id").write_text(f"{package}\n")
        (tmp_path / f"cpu{cpu}/topology/core_id").write_text(f"{core}\n")
    (tmp_path / "cpu3").mkdir()  # nothing is known
    (tmp_path / "cpufreq").mkdir()
    monkeypatch.setattr(cores, "CPUS", tmp_path)
    found = cores.topology.__wrapped__()
    assert found == {0: (0, 0, 5), 1: (1, 1, 5), 2: (0, 0, 5), 3: (0, 0, 3)}


def test_cores_are_split_whole_and_by_numa_node() -> None:
    # 2 packages of 4 cores; the hyperthread of cpu n is n + 8
    assert cores.split(range(16), 2, smt(2, 4)) == [{0, 1, 2, 3, 8, 9, 10, 11},
                                                    {4, 5, 6, 7, 12, 13, 14, 15}]  # fmt: skip
    four = cores.split(range(16), 4, smt(2, 4))
    assert four == [{0, 1, 8, 9}, {2, 3, 10, 11}, {4, 5, 12, 13}, {6, 7, 14, 15}]
    assert cores.split({0, 1, 8}, 2, smt(2, 4)) == [{0, 8}, {1}]
    assert cores.split({0, 8}, 2, smt(2, 4)) is None
    assert cores.split(range(3), 3, {}) == [{0}, {1}, {2}]


def test_random_splits_give_every_cpu_to_one_rank(rng: np.random.Generator) -> None:
    places = smt(int(rng.integers(1, 4)), int(rng.integers(1, 9)))
    cpus = {cpu for cpu in places if rng.random() < 0.8} or {0}
    whole = {places[cpu] for cpu in cpus}
    for ranks in range(1, len(whole) + 1):
        parts = cores.split(cpus, ranks, places)
        assert parts is not None
        assert sorted(cpu for part in parts for cpu in part) == sorted(cpus)
        of = [{places[cpu] for cpu in part} for part in parts]
        assert sum(map(len, of)) == len(whole), "a core was cut"
        assert max(map(len, of)) - min(map(len, of)) <= 1
    assert cores.split(cpus, len(whole) + 1, places) is None


@pytest.mark.parametrize(
    ("cpus", "more", "expected"),
    [
        (["0-7", "0-7"], {}, [4, 4]),
        (["0-3", "4-7"], {}, [4, 4]),
        (["0", "0", "0"], {}, [1, 1, 1]),
        (["0-7"] * 3, {}, [2, 2, 2]),
        (["0-7", "0-7"], {"allocated": 2}, [2, 2]),
        (["0-7", "0-7"], {"allocated": 64}, [4, 4]),
        (["0-7", "0-7"], {"quota": 4}, [2, 2]),
        (["0-7", "0-7"], {"quota": 1}, [1, 1]),
        (["0-3", "0-3", "4-7"], {}, [2, 2, 4]),
    ],
)
def test_the_share_of_a_rank(cpus: list[str], more: dict[str, int], expected: list[int]) -> None:
    found = seats(*cpus, **more)
    assert [binding.share(found, i) for i in range(len(found))] == expected


MEANT = "(MPIDL_OVERSUBSCRIBE=1 if that is meant)"
CLASHES = [
    (["0-1"] * 2, [1, 1], {}, None),
    (["0-7"] * 2, [4, 4], {}, None),
    (["0", "1"], [1, 1], {}, None),
    (["0-3"], [4], {}, None),
    (
        ["3"] * 4,
        [1] * 4,
        {},
        "all 4 ranks of n7 are bound to core 3, of 64: ask for cores of each "
        f"(srun --cpus-per-task=N, --cpu-bind=cores) {MEANT}",
    ),
    (
        ["0-1"] * 4,
        [1] * 4,
        {},
        f"4 ranks of n7 share CPUs 0-1: start at most 2 there, or give them more cores {MEANT}",
    ),
    (
        ["0-7"] * 2,
        [8, 8],
        {},
        "2 ranks of n7 with 8 threads each on CPUs 0-7: expected OMP_NUM_THREADS=4 at most "
        f"{MEANT}",
    ),
    (
        ["0-7"] * 2,
        [2, 2],
        {"quota": 2},
        "2 ranks of n7 with 2 threads each on a quota of 2 cores: expected OMP_NUM_THREADS=1 at "
        f"most {MEANT}",
    ),
    (
        ["0-7"] * 4,
        [1] * 4,
        {"quota": 2},
        "4 ranks of n7 share a quota of 2 cores: start at most 2 there, or give them more cores "
        f"{MEANT}",
    ),
    (["0-7"] * 4, [1] * 4, {"quota": 4}, None),
    (
        ["0", "1-7"],
        [2, 2],
        {},
        f"1 rank of n7 with 2 threads each on CPUs 0: expected OMP_NUM_THREADS=1 at most {MEANT}",
    ),
    (  # two pairs, each on one core of many
        ["0", "0", "1", "1"],
        [1] * 4,
        {},
        "2 ranks of n7 are bound to core 0, of 64: ask for cores of each "
        f"(srun --cpus-per-task=N, --cpu-bind=cores) {MEANT}",
    ),
    (  # each fits, but not together
        ["0-2", "1-3"],
        [3, 3],
        {},
        "2 ranks of n7 with 3 threads each on CPUs 0-3: expected OMP_NUM_THREADS=2 at most "
        f"{MEANT}",
    ),
]


@pytest.mark.parametrize(("cpus", "threads", "more", "text"), CLASHES)
def test_clashes(
    cpus: list[str], threads: list[int], more: dict[str, int], text: str | None
) -> None:
    assert binding.clash(seats(*cpus, **more), threads, "n7", 64) == text


def test_a_machine_of_one_core_is_no_mistake_of_the_scheduler() -> None:
    text = binding.clash(seats("0", "0"), [1, 1], "n7", 1)
    assert text is not None and text.startswith("2 ranks of n7 share CPUs 0: start at most 1 there")


def test_cores_of_ones_own() -> None:
    four = seats(*["0-15"] * 4, threads=2)
    found, problem = binding.bound(four, smt(2, 4))
    assert problem is None
    assert [cores.told(seat.cpus) for seat in found] == ["0-1,8-9", "2-3,10-11", "4-5,12-13",
                                                         "6-7,14-15"]  # fmt: skip
    assert {seat.threads for seat in found} == {2}
    by_launcher = seats("0-3", "4-7")
    assert binding.bound(by_launcher, smt(2, 4)) == (by_launcher, None)
    alone = seats("0-15")
    assert binding.bound(alone, smt(2, 4)) == (alone, None)
    crowd = seats("0", "0")
    found, problem = binding.bound(crowd, {})
    assert found == crowd
    assert problem is not None and problem.startswith("MPIDL_BIND=cores: 2 ranks on CPUs 0: not")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ([None] * 4, [0, 1, 2, 3]),
        (["0,1,2,3"] * 4, [0, 1, 2, 3]),
        (["0", "1", "2", "3"], [0, 0, 0, 0]),  # one each: that one
        (["0,1", "2,3", "0,1", "2,3"], [0, 0, 1, 1]),
        (["MIG-a", "MIG-b"], [0, 0]),
        (["", None], [0, 0]),
    ],
)
def test_the_number_among_those_that_see_the_same_gpus(
    visible: list[str | None], expected: list[int]
) -> None:
    found = [Seat(frozenset({0}), gpus=text) for text in visible]
    assert [binding.number_among(found, i) for i in range(len(found))] == expected


HOW = "start as many ranks as GPUs there, or let each see its own (srun --gpus-per-task=1, "


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([None, None], None),
        (["0000:3B:00.0 aa", "0000:5E:00.0 bb"], None),
        (["0000:3B:00.0 aa", "0000:3B:00.0 bb"], None),  # two parts of one (MIG)
        (["0000:3B:00.0 aa", None], None),
        (["P aa", "Q bb", "P aa"], "on n7 ranks 4, 8 share GPU P"),
        (["P aa"] * 2 + ["Q bb"] * 2, "on n7 ranks 4, 6 share GPU P, ranks 8, 10 share GPU Q"),
    ],
)
def test_two_ranks_with_one_gpu(found: list[str | None], expected: str | None) -> None:
    text = binding.shared_gpus(found, [4, 6, 8, 10][: len(found)], "n7")
    assert text == (expected and f"{expected}: {HOW}CUDA_VISIBLE_DEVICES) {MEANT}")


def test_a_gpu_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import stand_in

    cupy = stand_in.modules()["cupy"]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert array.gpu_of(np.zeros(1)) is None
    name = array.gpu_of(cupy.zeros(1))
    assert name == f"0000:00:00.0 {str(os.getpid()).encode().hex()}"


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*THREADS, "SLURM_CPUS_PER_TASK", "MPIDL_BIND", "MPIDL_OVERSUBSCRIBE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, None), ({"OMP_NUM_THREADS": "4,2"}, 4), ({"OMP_NUM_THREADS": "all"}, None),
     ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "8"}, 8), ({"OPENBLAS_NUM_THREADS": "0"}, None)],
)  # fmt: skip
def test_threads_that_the_user_has_set(
    values: dict[str, str], expected: int | None, clean: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        clean.setenv(name, value)
    assert config.threads() == expected


def test_settings(clean: pytest.MonkeyPatch) -> None:
    assert (config.bind(), config.oversubscribe(), config.allocated_cores()) == (
        "none",
        False,
        None,
    )
    clean.setenv("SLURM_CPUS_PER_TASK", "6")
    clean.setenv("MPIDL_OVERSUBSCRIBE", "1")
    assert (config.bind("cores"), config.oversubscribe()) == ("cores", True)
    assert config.allocated_cores() == 6
    clean.setenv("MPIDL_BIND", "sockets")
    with pytest.raises(InvalidArgument, match="MPIDL_BIND='sockets': expected one of none, cores"):
        config.bind()


def test_libraries_take_the_number_of_threads() -> None:
    """In a process of its own: the number stays. What OpenBLAS says is asked of it directly."""
    code = """
        import ctypes, os
        import numpy as np
        from mpidl import binding
        np.ones((2, 2)) @ np.ones((2, 2))
        binding._use_threads(1)
        assert os.environ["OMP_NUM_THREADS"] == "1"
        for path in {line.split()[-1] for line in binding._maps() if "openblas" in line}:
            library = ctypes.CDLL(path)
            asked = [getattr(library, name.replace("_set_", "_get_"), None)
                     for name in binding.SETTERS]
            print(next(get() for get in asked if get))
        cpu = min(os.sched_getaffinity(0))
        binding._move(frozenset({cpu}))
        masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
        assert masks and all(mask == {cpu} for mask in masks), masks
    """
    environment = {k: v for k, v in os.environ.items() if k not in THREADS}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**environment, "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"1"}, done.stdout


def test_what_was_found_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_clash", "2 ranks of n7 share CPUs 0")
    with pytest.warns(BindingWarning, match="^2 ranks of n7 share CPUs 0$"):
        binding.tell()
    binding.tell()
