"""`mpidl run` in a real SLURM allocation, and ranks that srun leaves each to itself."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from tests.conftest import MPI_LIBRARIES
from tests.hosts.test_slurm import Cluster, cluster

__all__ = ["cluster"]

WHERE = """
import os, socket
import mpidl
world = mpidl.init()
assert world.sum([1.0])[0] == world.size
print(world.size, world.nodes, socket.gethostname(), os.environ["OMP_NUM_THREADS"])
"""
# Each rank tells, though srun may end the others when one has failed.
ALONE = """
import os, pathlib
import mpidl
try:
    print("trained", mpidl.init().size)
except mpidl.MpidlError as error:
    told = pathlib.Path("told-" + os.environ["SLURM_PROCID"])
    told.write_text(f"{type(error).__name__}: {error}")
    raise
"""
# Ranks, hosts, a host, threads of a rank: how often. (Many ranks on few cores take long.)
ALL, THREE = {"4 2 t0 1": 2, "4 2 t1 1": 2}, {"3 2 t0 1": 2, "3 2 t1 1": 1}


def pmix() -> bool:
    """Whether SLURM can offer PMIx here."""
    return any(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so.2"))


def where(cluster: Cluster, mpi: str, *words: str) -> dict[str, int]:
    """Return how often ranks say what, of a run within a job of two nodes with two tasks each."""
    job = ("salloc", "-Q", "-N2", "--ntasks-per-node=2")
    told = cluster.does(*job, *words, "where.py", mpi=mpi)
    return dict(Counter(told.splitlines()))


def alone(cluster: Cluster, mpi: str, plugin: str) -> set[str]:
    """Return what the two ranks of a step tell that do not find each other: the same, in short."""
    command = ("srun", f"--mpi={plugin}", "-N2", "-n2", "python", "alone.py")
    output = cluster.does(*command, mpi=mpi, status=1)
    assert "trained" not in output
    told = [cluster.folder / f"told-{rank}" for rank in range(2)]
    texts = [file.read_text() for file in told]
    for file in told:
        file.unlink()
    assert "(this SLURM has " in texts[0]
    return {re.sub(r" \(this SLURM has [^)]*\)", "", text) for text in texts}


def test_runs_in_an_allocation(cluster: Cluster) -> None:
    """Ranks are where the job is; those that srun leaves alone tell the flag, and do not train."""
    (cluster.folder / "where.py").write_text(WHERE)
    (cluster.folder / "alone.py").write_text(ALONE)
    run, by_srun = ("mpidl", "run"), ("mpidl", "run", "-n", "3", "--launcher", "srun")
    # from within a step on one node, which changes what SLURM tells
    assert where(cluster, "openmpi", "srun", "-n1", "-N1", *run) == ALL
    (text,) = alone(cluster, "openmpi", "pmi2")
    assert text.startswith("LauncherMismatch: srun started 2 ranks (PMI_SIZE=2), but each ")
    assert "loaded (Open MPI v" in text and "Start them with srun --mpi=pmix, or use " in text
    step = ("srun", "--mpi=pmi2", "-N2", "-n2", "python", "alone.py")
    for mpi in ("openmpi", *["mpich"] * MPI_LIBRARIES["mpich"].exists()):
        assert cluster.does(*step, mpi=mpi, MPIDL_ALONE="1") == "trained 1\n" * 2
    if pmix():
        assert where(cluster, "openmpi", *by_srun) == THREE
    if MPI_LIBRARIES["mpich"].exists():
        assert where(cluster, "mpich", *run, "-n", "3") == THREE
        assert where(cluster, "mpich", *by_srun) == THREE
        for plugin in ("none", *["pmix"] * pmix()):
            (text,) = alone(cluster, "mpich", plugin)
            assert "loaded (MPICH Version: " in text
            assert "Start them with srun --mpi=pmi2, or use the launcher that " in text
