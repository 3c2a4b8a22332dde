"""What starts the ranks, and how it is told. All launchers are stand-ins that show their words."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from mpidl import cores
from mpidl.cli import dialects, launcher, starters
from mpidl.cli.allocation import Allocation, Chosen
from mpidl.cli.app import app
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

VERSIONS = {
    "openmpi": "Open MPI v5.0.11",
    "mpich": "MPICH Version: 5.0.2",
    "intel": "Intel(R) MPI Library 2021.13 for Linux* OS",
    "unknown": "Microsoft MPI 10.1",
}
SIGNS = {"openmpi": "mpirun (Open MPI) 5.0.11", "mpich": "HYDRA build details:"}
PLUGINS = "MPI plugin types are...\\n\\tpmix\\n\\tnone\\n\\tpmi2\\n"
SLURM = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)",
         "SLURM_JOB_CPUS_PER_NODE": "8(x2)"}  # fmt: skip
LSF = {"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "n1 4 n2 4"}
OF_JOBS = ("SLURM_", "PBS_", "LSB_", "FLUX_", "NCPUS", "OMP_", "OMPI_", "I_MPI_", "MPIDL_",
           "OPENBLAS_", "PYTHON", "COVERAGE", "PRTE_", "MPI4PY_")  # fmt: skip


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No job, four cores, not root, no terminal, and no launcher but those that a test makes."""
    for name in set(os.environ):
        if name.startswith(OF_JOBS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cores, "available", lambda: 4)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").symlink_to("/bin/sh")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Make launchers be there, of this MPI; the scheduler's are by the names of Name."""

    def make(vendor: str, *names: str) -> launcher.Library:
        for name in names:
            text = f"printf '{PLUGINS}'" if name == "srun" else f"echo '{SIGNS.get(vendor, '')}'"
            shown = 'printf "%s\\\\n" "$0" "$@"'  # each word on a line of its own
            text = f"case $1 in --mpi=list | --version) {text} ;; *) {shown} ;; esac"
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        library = launcher.Library(vendor, VERSIONS[vendor], None, launcher._launcher(vendor, None))
        monkeypatch.setattr(launcher, "query", lambda: library)
        return library

    return make


def line(*words: str, status: int = 0) -> str:
    """Return what `mpidl run --dry-run WORDS... sh` shows: of the command, what is before sh."""
    result = CliRunner().invoke(app, ["run", "--dry-run", *words, "sh"])
    assert result.exit_code == status, result.output
    if status:
        assert result.stderr.startswith("mpidl: ")
        return " ".join(result.stderr.split()) + "\n"
    shown = shlex.split(result.stdout)
    assert shown[0] == "env" and shown[-1].endswith("/bin/sh")
    return " ".join(word.rsplit("/", 1)[-1] for word in shown[1:-1])


def inside(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# --- which


@pytest.mark.parametrize(
    ("vendor", "job", "names", "expected"),
    [
        ("openmpi", {}, "mpirun srun flux", "mpirun"),
        ("openmpi", SLURM, "mpirun srun", "mpirun"),
        ("mpich", SLURM, "mpiexec srun", "mpiexec"),
        ("mpich", SLURM, "srun aprun", "srun"),
        ("mpich", SLURM, "aprun", "aprun"),
        ("openmpi", LSF, "mpirun", "mpirun"),
        ("openmpi", LSF, "mpirun jsrun", "jsrun"),
        ("mpich", LSF, "mpiexec jsrun", "mpiexec"),
    ],
)
def test_the_default(
    vendor: str,
    job: dict[str, str],
    names: str,
    expected: str,
    there,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside(monkeypatch, job)
    there(vendor, *names.split())
    words = line("-n", "2").split()
    assert next(word for word in words if "=" not in word) == expected


def test_flux_is_the_default_in_it(there, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there("mpich", "mpiexec")
    (tmp_path / "bin/flux").write_text("#!/bin/sh\necho 2 16 4 f[1-2]\n")
    (tmp_path / "bin/flux").chmod(0o755)
    monkeypatch.setenv("FLUX_URI", "local:///run/flux")
    shown = "flux run --ntasks=4 --cores-per-task=4 --nodes=2 --gpus-per-task=1"
    assert line().endswith(shown)
    assert line("--gpus-per-rank", "0").endswith("--nodes=2")
    named = "--cores-per-task=4 --nodes=1 --requires=hosts:f2 --gpus-per-task=1"
    assert line("--hosts", "f2:2").endswith(named)
    assert "mpiexec -n 2 -hosts f2:2" in line("--hosts", "f2:2", "--launcher", "mpiexec")
    assert "mpiexec -n 4 -hosts f1:2,f2:2" in line("--restarts", "2")
    there("openmpi", "mpirun")
    assert line().endswith("--gpus-per-task=1 -o pmi=pmix")
    assert "expected as many on each" in line("--hosts", "f1:2,f2:1", status=2)


@pytest.mark.parametrize("names", ["", "srun aprun"])
def test_nothing_that_starts_ranks(names: str, there) -> None:
    """Outside of a job srun would queue for one."""
    there("mpich", *names.split())
    assert "but none of its launchers (mpiexec, mpiexec.hydra, " in line(status=2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--launcher srun", "--launcher srun: no srun on PATH; expected mpirun or flux"),
        ("--launcher mpiexec", "Open MPI v5.0.11 has none beside it or on PATH; expected mpirun"),
        ("--launcher flux --elastic", "--elastic: flux ends all ranks with the first; expected "
         "the MPI's own launcher, mpirun"),
        ("--launcher flux --restarts 2", "--restarts: flux ends all ranks with the first"),
        ("--gpus-per-rank 1", "mpirun hands out none"),
        ("--launcher flux --hosts a:2,b:1", "expected as many on each"),
    ],
)  # fmt: skip
def test_what_cannot_be(words: str, told: str, there) -> None:
    there("openmpi", "mpirun", "flux")
    assert told in line(*words.split(), status=2)


def test_an_unknown_launcher_lists_the_known_ones() -> None:
    result = CliRunner().invoke(app, ["run", "--launcher", "orterun", "sh"])
    assert result.exit_code == 2
    for name in starters.Name:
        assert f"'{name.value}'" in result.stderr


# --- how each is told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "mpirun -n 4 --host n1:2,n2:2 -x OMP_NUM_THREADS -x PYTHONUNBUFFERED "
         "--map-by :OVERSUBSCRIBE --bind-to none"),
        ("-n 3", "mpirun -n 3 --host n1:2,n2:1 -x"),
        ("-n 6", "mpirun -n 6 --host n1:3,n2:3 -x"),
        ("--launcher mpirun --elastic", "--bind-to none --with-ft ulfm"),
        ("--launcher srun", "srun --ntasks=4 --nodes=2 --ntasks-per-node=2 --cpus-per-task=4 "
         "--mpi=pmix --kill-on-bad-exit=1 --export=ALL"),
        ("--launcher srun -n 2", "--ntasks=2 --nodes=1 --ntasks-per-node=2 --nodelist=n1 --cpus-"),
        ("--launcher srun -n 3", "srun --ntasks=3 --nodes=2 --cpus-per-task=4 --mpi"),
        ("--launcher srun --hosts n2:1,n1:2", "srun --ntasks=3 --nodes=2 "
         "--distribution=arbitrary --nodelist=n2,n1,n1 --cpus-per-task=4 --mpi"),
        ("--launcher srun --hosts n1:9,n2:9", "--ntasks-per-node=9 --overcommit --mpi=pmix"),
        ("--launcher srun --gpus-per-rank 1", "--cpus-per-task=4 --gpus-per-task=1 --mpi=pmix"),
        ("--launcher srun --launcher-args --mem=1G", "--export=ALL --mem=1G"),
    ],
)  # fmt: skip
def test_in_a_slurm_job(words: str, told: str, there, monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, SLURM)
    there("openmpi", "mpirun", "srun")
    shown = line(*words.split())
    assert told in shown
    assert "SLURM_OVERLAP=1" in shown


def test_threads_are_the_share_of_a_hosts_cores(there, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the job's cores, not of this host's; and of the ranks of a host, not of all."""
    inside(monkeypatch, SLURM)
    there("openmpi", "mpirun")
    for words, threads in (("", 4), ("-n 16", 1), ("-n 2", 4), ("--hosts n1:1,n2:1", 8)):
        shown = line(*words.split())
        assert f"OMP_NUM_THREADS={threads} " in shown
        assert ("yield_when_idle=1" in shown) == (words == "-n 16")
    assert "OMP_NUM_THREADS=2 " in line("--hosts", "x:2,y:2")  # as many as here
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert not line().startswith("OMP_NUM")


def test_srun_without_a_job(there, monkeypatch: pytest.MonkeyPatch) -> None:
    there("mpich", "srun")
    shown = line("--launcher", "srun", "-n", "2")
    assert shown.startswith("OMP_NUM_THREADS=1 ")  # SLURM gives each a core, wherever that is
    assert "srun --ntasks=2 --cpus-per-task=1 --mpi=pmi2" in shown
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    srun = ("--launcher", "srun")
    assert "srun --ntasks=3 --cpus-per-task=2 --mpi=pmi2" in line(*srun, "-n", "3")
    told = "--hosts a:2,b:1: with srun, MPICH Version: 5.0.2 needs as many ranks on each"
    assert told in line(*srun, "--hosts", "a:2,b:1", status=2)
    assert "--nodes=2 --ntasks-per-node=2 --nodelist=a,b " in line(*srun, "--hosts", "a:2,b:2")


@pytest.mark.parametrize(
    ("vendor", "version", "listed", "plugin"),
    [
        ("openmpi", None, "pmix\\npmi2", "pmix"),
        ("openmpi", None, "pmix_v3\\npmix_v4\\npmi2", "pmix_v4"),
        ("openmpi", "Open MPI v4.1.6", "pmi2", "pmi2"),
        ("openmpi", None, "pmi2\\nnone", None),
        ("openmpi", None, "", "pmix"),
        ("mpich", None, "pmix\\npmi2", "pmi2"),
        ("mpich", None, "pmix", None),
        ("mpich", "MPI VERSION : CRAY MPICH version 8.1", "cray_shasta\\npmi2", "cray_shasta"),
        ("mpich", "MPI VERSION : CRAY MPICH version 8.1", "pmi2", "pmi2"),
        ("intel", None, "pmi2", "pmi2"),
        ("unknown", None, "pmi2", ""),
    ],
)
def test_the_plugin_of_srun(
    vendor: str, version: str | None, listed: str, plugin: str | None, tmp_path: Path
) -> None:
    (tmp_path / "bin/srun").write_text(f"#!/bin/sh\nprintf 'MPI types are...\\n{listed}\\n'\n")
    (tmp_path / "bin/srun").chmod(0o755)
    library = launcher.Library(vendor, version or VERSIONS[vendor], None, None)
    if plugin is None:
        with pytest.raises(InvalidArgument, match=r"needs --mpi=.*, and this SLURM has p"):
            dialects.OPTIONS["srun"](library, Chosen(2), None)
    else:
        words = dialects.OPTIONS["srun"](library, Chosen(2), None)
        assert [w for w in words if w.startswith("--mpi")] == [f"--mpi={plugin}"] * bool(plugin)


def test_intel_mpi_is_told_where_slurms_library_is(
    there, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there("intel", "srun")
    monkeypatch.setattr(starters, "INTEL_PMI", (str(tmp_path / "no"), str(tmp_path / "bin/srun")))
    starter = starters.choose(launcher.query(), Chosen(2), "srun")
    assert starter.environment(Chosen(2))["I_MPI_PMI_LIBRARY"] == str(tmp_path / "bin/srun")
    monkeypatch.setenv("I_MPI_PMI_LIBRARY", "/mine.so")
    assert "I_MPI_PMI_LIBRARY" not in starter.environment(Chosen(2))


def test_jsrun(there, monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, LSF)
    there("openmpi", "mpirun", "jsrun")
    told = "jsrun --nrs 4 --tasks_per_rs 1 --cpu_per_rs 1 --gpu_per_rs 1 --rs_per_host 4 "
    told += "--launch_distribution packed --bind packed:1"
    assert line("-n", "4", "--gpus-per-rank", "1").endswith(told)
    assert "--cpu_per_rs 4" in line("-n", "1")
    assert "expected --launcher mpirun" in line("--launcher", "jsrun", "--hosts", "n1:2", status=2)
    assert "mpirun -n 2 --host n1:2" in line("--hosts", "n1:2")


def test_lsf_starts_daemons_in_place_of_ssh(there, monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, LSF)
    there("openmpi", "mpirun")
    assert "blaunch" not in line()
    there("openmpi", "blaunch")
    assert "PRTE_MCA_plm_ssh_agent=blaunch OMPI_MCA_plm_rsh_agent=blaunch" in line()
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", "mine")
    assert "plm_ssh_agent" not in line()


def test_aprun(there, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n")
    inside(monkeypatch, {"PBS_NODEFILE": str(tmp_path / "nodes"), "NCPUS": "8"})
    there("mpich", "aprun")
    assert line().endswith("aprun -n 4 -d 4 -cc depth -N 2")
    assert line("--hosts", "n1:4,n2:4").endswith("aprun -n 8 -d 2 -cc depth -N 4 -L n1,n2")


def test_the_mpiexec_of_pals(there, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known by where it lies."""
    library = there("mpich")
    real = tmp_path / "opt/cray/pals/1.4/bin/mpiexec"
    real.parent.mkdir(parents=True)
    real.write_text("#!/bin/sh\necho mpiexec 1.4\n")
    real.chmod(0o755)
    (tmp_path / "bin/mpiexec").symlink_to(real)
    inside(monkeypatch, {"PBS_NODEFILE": str(tmp_path / "nodes"), "NCPUS": "8"})
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n")
    for words in ((), ("--launcher", "mpiexec")):
        assert line(*words).endswith("mpiexec -n 4 --depth 4 --cpu-bind depth --ppn 2")
    assert line("--hosts", "n2:1").endswith("--depth 8 --cpu-bind depth --ppn 1 --hosts n2")
    chosen = Chosen(4, {"n1": 2, "n2": 2}, 8, Allocation("PBS", {"n1": 2, "n2": 2}))
    open_mpi = starters.Starter("pals", there("openmpi"), str(real), own=False)
    assert "--pmi=pmix" in open_mpi.options(chosen)
    assert library.launcher is None


def test_the_words_that_are_shown_are_those_that_run(
    there, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in takes this process's place: so in a child."""
    inside(monkeypatch, SLURM)
    there("mpich", "srun")
    code = (
        "from mpidl.cli import app, launcher; "
        f"launcher.query = lambda: launcher.Library('mpich', {VERSIONS['mpich']!r}, None, None); "
        "app.app()"
    )
    line = [sys.executable, "-c", code, "run", "sh", "a b"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    result = CliRunner().invoke(app, ["run", "--dry-run", "sh", "a b"])
    shown = shlex.split(result.stdout)
    assert words == [word for word in shown[1:] if "=" not in word or word.startswith("--")]
    assert words[0].endswith("/srun") and words[-1] == "a b"
