"""The job scripts of launch/: a signal reaches the ranks, and a run that wants to go on does.

Commands of schedulers are stand-ins that write down how they were called: see `COMMANDS`.
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SLURM = sorted(LAUNCH.glob("*.sbatch"))
TEMPLATES = [*SLURM, *(LAUNCH / name for name in ("pbs.sh", "lsf.sh", "flux.sh"))]
# Starts the ranks: says what it got, and ends as ranks do that have written a checkpoint.
RANKS = """#!/bin/bash
trap 'echo stopped >> "$LOG"; sleep 0.2; touch "$MPIDL_OUT/again"; exit 75' USR1
touch "$LOG.started"
for i in {1..100}; do sleep 0.05; done
"""
ENDS = "#!/bin/bash\ntouch $LOG.started; exit "
AGAIN = ENDS.replace("exit", "touch $MPIDL_OUT/again; exit")  # as mpidl.signals.leave does it
COMMANDS = {
    "scontrol": 'echo "scontrol $@" >> "$LOG"',
    "qsub": 'echo "qsub $@" >> "$LOG"; cat > "$LOG.again"; echo 18.server',
    "flux": 'case $1 in getattr) echo f17 ;; *) echo "flux $@" >> "$LOG" ;; esac\n'
    'case $1 in run) exec "$LOG.ranks" ;; --parent) echo f18 ;; esac',
}
SETTINGS = {
    "slurm": {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"},
    "pbs": {"PBS_JOBID": "17.server"},
    "lsf": {"LSB_JOBID": "17"},
    "flux": {},
}
CASES = [
    (RANKS, 1, 75, ["stopped"]),
    (RANKS, 2, 75, ["stopped"]),
    (ENDS + "0", 0, 0, []),
    (ENDS + "3", 0, 3, []),
    (ENDS + "74", 0, 74, []),
    (AGAIN + "75", 0, 75, []),
    (ENDS + "75", 0, 1, []),  # of the launcher itself
]


def start(
    path: Path, system: str, ranks: str, folder: Path, **extra: str
) -> subprocess.Popen[bytes]:
    """Start a job script as its scheduler does, in `folder`."""
    bin_ = folder / "bin"
    bin_.mkdir()
    (folder / "nodes").write_text("a\na\nb\nb\n")
    for name, text in {**COMMANDS, "mpidl": None}.items():
        (bin_ / name).write_text(ranks if text is None else f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    (folder / "log.ranks").write_text(ranks)
    (folder / "log.ranks").chmod(0o755)
    places = {"SLURM_SUBMIT_DIR": folder, "PBS_O_WORKDIR": folder, "LS_SUBCWD": folder}
    files = {"PBS_NODEFILE": folder / "nodes", "LSB_DJOB_HOSTFILE": folder / "nodes"}
    environment = {
        "PATH": f"{bin_}:/usr/bin:/bin",
        "LOG": str(folder / "log"),
        **SETTINGS[system],
        **{name: str(value) for name, value in {**places, **files}.items()},
        **extra,
    }
    return subprocess.Popen(["/bin/bash", str(path)], env=environment, cwd=folder)


def finish(
    process: subprocess.Popen[bytes], folder: Path, signals: int = 0
) -> tuple[int, list[str]]:
    """Wait for the ranks, send signals to the script, and return its status and the log."""
    try:
        end = time.monotonic() + 20
        while not (folder / "log.started").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        for _ in range(signals):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        status = process.wait(timeout=20)
    finally:
        process.kill()
    told = folder / "log"
    return status, list(dict.fromkeys(told.read_text().splitlines() if told.exists() else []))


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.name)
@pytest.mark.parametrize(("ranks", "signals", "status", "log"), CASES)
def test_slurm_queues_it_again(
    path: Path, ranks: str, signals: int, status: int, log: list[str], tmp_path: Path
) -> None:
    process = start(path, "slurm", ranks, tmp_path)
    again = ["scontrol requeue 17"] * (status == 75)
    assert finish(process, tmp_path, signals) == (status, log + again)
    run = tmp_path / "runs/17"
    assert run.stat().st_mode & 0o777 == 0o700
    assert (run / "jobs.log").read_text().endswith(" started 17\n")


@pytest.mark.parametrize(("ranks", "signals", "status", "log"), CASES)
def test_lsf_queues_it_again_for_its_status(
    ranks: str, signals: int, status: int, log: list[str], tmp_path: Path
) -> None:
    assert "#BSUB -Q 75" in (LAUNCH / "lsf.sh").read_text().splitlines()
    process = start(LAUNCH / "lsf.sh", "lsf", ranks, tmp_path, LSB_JOBINDEX="0")
    assert finish(process, tmp_path, signals) == (status, log)
    told = (tmp_path / "runs/17/job.log").read_text().splitlines()
    assert told[0] == "4 ranks: a:2,b:2"
    assert len(told) == 1 + (ranks == ENDS + "75")


@pytest.mark.parametrize(("index", "more"), [(None, ""), ("4", ",MPIDL_INDEX=4")])
def test_pbs_sends_the_signal_itself_and_submits_again(
    index: str | None, more: str, tmp_path: Path
) -> None:
    text = (LAUNCH / "pbs.sh").read_text().replace("train_seconds=3480", "train_seconds=0.3")
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch/pbs.sh"
    script.write_text(text.replace("#PBS -j oe", "#PBS -j oe\n#PBS -J 0-9"))
    array = {} if index is None else {"PBS_ARRAY_INDEX": index, "PBS_JOBID": f"17[{index}].server"}
    process = start(script, "pbs", RANKS, tmp_path, **array)
    assert finish(process, tmp_path) == (75, ["stopped", f"qsub -v MPIDL_FIRST=17{more}"])
    again = (tmp_path / "log.again").read_text()
    assert again == text
    run = tmp_path / "runs/17" / (index or "")
    assert (run / "jobs.log").read_text().splitlines()[1].endswith(" queued 18.server")

    # the next job goes on in the same folder
    next_one = tmp_path / "next"
    next_one.mkdir()
    (tmp_path / "again.sh").write_text(again)
    settings = {"PBS_JOBID": "18.server", "MPIDL_FIRST": "17", "PBS_O_WORKDIR": str(tmp_path)}
    settings |= {} if index is None else {"MPIDL_INDEX": index}
    process = start(tmp_path / "again.sh", "pbs", ENDS + "0", next_one, **settings)
    assert finish(process, next_one) == (0, [])
    assert (run / "jobs.log").read_text().splitlines()[2].endswith(" started 18.server")


@pytest.mark.parametrize("status", [75, 3, 0])
def test_flux_sends_the_signal_and_it_is_submitted_again(status: int, tmp_path: Path) -> None:
    process = start(LAUNCH / "flux.sh", "flux", f"{AGAIN}{status}", tmp_path)
    code, (ran, *again) = finish(process, tmp_path)
    assert code == status
    assert ran.startswith("flux run --nodes=2 --ntasks=4 --cores-per-task=1 --time-limit=3570s ")
    assert " --signal=USR1@90s python -m mpi4py " in ran
    assert again == ["flux --parent batch launch/flux.sh"] * (status == 75)
    lines = (tmp_path / "runs/f17/jobs.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "started f17",
        *["queued f18"] * len(again),
    ]


def test_the_jobs_of_an_array_have_folders_and_indices_of_their_own(tmp_path: Path) -> None:
    text = SLURM[0].read_text().replace("ring)", "ring --seed {index})")
    (tmp_path / "job.sh").write_text(text)
    ranks = '#!/bin/bash\ntouch "$LOG.started"; echo "$MPIDL_OUT $*" >> "$LOG"\n'
    array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}
    process = start(tmp_path / "job.sh", "slurm", ranks, tmp_path, **array)
    status, (line,) = finish(process, tmp_path)
    assert status == 0
    assert line.startswith(f"{tmp_path}/runs/16/3 run -n 2 python ")
    assert line.endswith(" --strategy ring --seed 3")


@pytest.mark.parametrize(
    ("visible", "rank", "expected"),
    [("4,6", "1", "6"), ("4,6", "3", "6"), ("5", "2", "5"), ("", "2", "2")],
)
def test_each_rank_sees_one_gpu(visible: str, rank: str, expected: str, tmp_path: Path) -> None:
    ranks = '#!/bin/bash\ntouch "$LOG.started"; shift 3\n"${@:1:4}" printenv "$SHOWN" >> "$LOG"\n'
    settings = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_LOCALID": rank}
    settings["SHOWN"] = "CUDA_VISIBLE_DEVICES"
    process = start(LAUNCH / "slurm_gpu.sbatch", "slurm", ranks, tmp_path, **settings)
    assert finish(process, tmp_path) == (0, [expected])


@pytest.mark.parametrize("rank", ["", "x[$(touch gone)]", "-1", "1 2"])
def test_what_is_no_rank_is_not_computed_with(rank: str, tmp_path: Path) -> None:
    ranks = '#!/bin/bash\ntouch "$LOG.started"; shift 3\nexec "${@:1:4}" true\n'
    process = start(LAUNCH / "slurm_gpu.sbatch", "slurm", ranks, tmp_path, SLURM_LOCALID=rank)
    assert finish(process, tmp_path) == (2, [])
    assert list(tmp_path.rglob("gone")) == []


@pytest.mark.parametrize("before", [98, 99])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_run_that_comes_to_no_end_is_given_up(path: Path, before: int, tmp_path: Path) -> None:
    system = path.name.split(".")[0].split("_")[0]
    run = tmp_path / ("runs/f17" if system == "flux" else "runs/17")
    run.mkdir(parents=True)
    (tmp_path / "launch").symlink_to(LAUNCH)
    (run / "jobs.log").write_text("2026-01-02T03:04:05Z started 1\n" * before)
    status, log = finish(start(path, system, AGAIN + "75", tmp_path), tmp_path)
    assert status == (75 if before == 98 else 1)
    again = [line for line in log if not line.startswith("flux run")]
    assert len(again) == (before == 98 and system != "lsf")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_status_of_the_launcher_itself_queues_nothing(path: Path, tmp_path: Path) -> None:
    """Nor does the word that ranks have left when they were started before."""
    system = path.name.split(".")[0].split("_")[0]
    run = tmp_path / ("runs/f17" if system == "flux" else "runs/17")
    run.mkdir(parents=True)
    (run / "again").touch()
    status, log = finish(start(path, system, ENDS + "75", tmp_path), tmp_path)
    assert status == 1
    assert [line for line in log if not line.startswith("flux run")] == []
