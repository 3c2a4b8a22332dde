"""`mpidl run --restarts` on one host: runs that are started again, and runs that are not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from mpidl import watchdog
from tests import job
from tests.jobs.test_failures import only_mpich
from tests.jobs.test_interrupt import running

# A launcher that lies: it starts ranks, and ends with the status that a file tells, or not at all.
LAUNCHER = """#!{python}
import os, subprocess, sys, time
assert sys.argv[1] == "-n"
ranks = [subprocess.Popen(sys.argv[3:], env={{**os.environ, "PMI_RANK": str(rank)}})
         for rank in range(int(sys.argv[2]))]
for rank in ranks:
    rank.wait()
said = open("says").read()
if said == "never":
    time.sleep(60)
sys.exit(int(said))
"""
# A supervisor whose library is a stand-in. Options: ranks, restarts, least.
DRIVE = """
import sys
from mpidl.cli import launcher, supervise

library = launcher.Library("unknown", "fake 1.0", None, "./launcher")
program = [sys.executable, "rank.py"]
sys.exit(supervise.run(supervise.Job(library, program, 2, 2, least=int(sys.argv[1]))))
"""
# Ranks that report, and use no MPI.
RANK = """
import os, sys, time, types
from mpidl import abort, config, supervised

supervised.start()
supervised.tell_size(2)
attempt, rank = int(os.environ["MPIDL_ATTEMPT"]), int(os.environ["PMI_RANK"])
abort.install(types.SimpleNamespace(rank=rank, size=2, Abort=os._exit), "here")
supervised.note_step(10 * attempt + 1)
os.write(1, f"attempt {attempt} run {os.environ['MPIDL_RUN']}\\n".encode())
assert "MPIDL_SUPERVISOR" not in os.environ
end = lambda status: (abort.end_with(status or None), sys.exit(0))
"""
SAYS = {
    "the_others_end_well": "if attempt == 0 and rank == 1:\n    os.kill(os.getpid(), 9)\nend(0)",
    "all_die": "if attempt == 0:\n    os.kill(os.getpid(), 9)\nend(0)",
    "well": "end(0)",
    "not_saved": "end(74)",
    "asked": "end(75)",
    "at_odds": "end(75 if rank and attempt == 0 else 0)",
    "at_once": "time.sleep(0.5)\nos._exit(0)",
    "exits": "sys.exit(3)",
    "raises": "raise ValueError('leaf')",
    "always": "time.sleep(0.05)\nos.kill(os.getpid(), 9)",
}


def drive(folder: Path, code: str, says: str, least: int = 1, **extra: str) -> job.Result:
    (folder / "launcher").write_text(LAUNCHER.format(python=sys.executable))
    (folder / "launcher").chmod(0o755)
    (folder / "says").write_text(says)
    (folder / "rank.py").write_text(code)
    (folder / "drive.py").write_text(DRIVE)
    line = (sys.executable, "drive.py", str(least))
    return job.execute(None, *line, cwd=folder, timeout=40, **extra)


def attempts(result: job.Result) -> list[int]:
    told = re.findall(r"attempt (\d) run ([0-9a-f]{16})\n", result.output)
    assert len({run for _, run in told}) == 1, result
    return sorted(int(attempt) for attempt, _ in told)


@pytest.mark.parametrize(
    ("does", "says", "status", "tried"),
    [
        ("the_others_end_well", "0", 0, [0, 0, 1, 1]),
        pytest.param("all_die", "never", 0, [0, 0, 1, 1], marks=pytest.mark.soak),
        ("well", "1", 0, [0, 0]),
        pytest.param("not_saved", "0", 74, [0, 0], marks=pytest.mark.soak),
        ("asked", "3", 75, [0, 0]),
        ("at_odds", "0", 0, [0, 0, 1, 1]),
        pytest.param("at_once", "0", 1, [0, 0, 1, 1, 2, 2], marks=pytest.mark.soak),
        pytest.param("exits", "0", 1, [0, 0, 1, 1, 2, 2], marks=pytest.mark.soak),
        pytest.param("raises", "5", 5, [0, 0, 1, 1, 2, 2], marks=pytest.mark.soak),
    ],
)
def test_the_ranks_decide_and_not_the_launcher(
    does: str, says: str, status: int, tried: list[int], tmp_path: Path
) -> None:
    result = drive(tmp_path, RANK + SAYS[does], says)
    assert (result.status, attempts(result)) == (status, tried), result
    lines = result.errors.count("mpidl: attempt ")
    assert lines == len(tried) // 2 - (status in (0, 74, 75)), result
    assert ("given up: --restarts is 2" in result.errors) == (len(tried) == 6), result


def test_a_script_that_fails_at_once_is_given_up(tmp_path: Path) -> None:
    result = drive(tmp_path, RANK.replace("supervised.note_step", "str") + SAYS["always"], "9")
    assert (result.status, attempts(result)) == (9, [0, 0, 1, 1]), result
    assert "given up: 2 attempts in a row failed before their first step\n" in result.errors, result


def test_too_few_ranks_are_given_up(tmp_path: Path) -> None:
    result = drive(tmp_path, RANK + SAYS["always"], "9", least=3)
    assert (result.status, attempts(result)) == (9, [0, 0]), result
    assert "given up: 2 ranks are left, and --min-ranks is 3\n" in result.errors, result


@pytest.mark.parametrize(("says", "status", "tries"), [("0", 0, 1), ("75", 75, 1), ("3", 3, 2)])
def test_a_script_without_mpidl(says: str, status: int, tries: int, tmp_path: Path) -> None:
    result = drive(tmp_path, "import os\nos.write(1, b'alone\\n')\n", says)
    assert (result.status, result.output) == (status, "alone\n" * 2 * tries), result
    assert ("no rank reported" in result.errors) == (tries == 1), result


@pytest.mark.parametrize("seconds", [3])
def test_code_that_holds_the_interpreter_is_no_death(seconds: int, tmp_path: Path) -> None:
    """Three times as long as a lease; and then one that was stopped for as long."""
    code = f"""
import ctypes, subprocess
ctypes.PyDLL(None).sleep({seconds})
waker = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {{os.getpid()}}"])
os.kill(os.getpid(), 19)
supervised.check_lease()
waker.wait()
end(0)
"""
    settings = {"MPIDL_LEASE_SECONDS": "1", "MPIDL_SILENT_SECONDS": "2"}
    result = drive(tmp_path, RANK + code, "0", **settings)
    assert (result.status, attempts(result), result.errors) == (0, [0, 0], ""), result


def test_without_a_supervisor_ranks_end(tmp_path: Path) -> None:
    """Killed, or stopped for longer than the lease; and nothing is written any more."""
    code = """
open(f"{rank}.tmp", "w").write(str(os.getpid()))
os.rename(f"{rank}.tmp", f"{rank}.pid")
while True:
    time.sleep(0.05)
    if rank:
        supervised.check_lease()
        open("written", "w").write(str(time.time()))
"""
    ranks: list[int] = []
    for number in (signal.SIGSTOP, signal.SIGKILL):
        folder = tmp_path / str(int(number))
        folder.mkdir()
        for name, text in (("launcher", LAUNCHER.format(python=sys.executable)), ("says", "never"),
                           ("rank.py", RANK + code), ("drive.py", DRIVE)):  # fmt: skip
            (folder / name).write_text(text)
        (folder / "launcher").chmod(0o755)
        settings = {"MPIDL_LEASE_SECONDS": "1"}
        line = (sys.executable, "drive.py", "1")
        process = job.start(None, *line, cwd=folder, **settings)
        try:
            end = time.monotonic() + 20
            while len(found := list(folder.glob("*.pid"))) < 2 or not (folder / "written").exists():
                assert time.monotonic() < end
                time.sleep(0.02)
            ranks = [int(path.read_text()) for path in found]
            assert all(map(running, ranks))
            process.send_signal(number)
            at, end = time.time(), time.monotonic() + 10
            while any(map(running, ranks)):
                assert time.monotonic() < end
                time.sleep(0.02)
            assert float((folder / "written").read_text()) < at + 1.1
        finally:
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            result = job.finish(process, 10)
        reason = "no answer of the supervisor for 1 s" if number == signal.SIGSTOP else "connection"
        assert result.errors.count(" ends itself: ") == 2, result
        assert reason in result.errors, result


SECRET = """
import mpidl, os, time
world = mpidl.init()
lines = [open(f"/proc/{pid}/cmdline").read() for pid in os.listdir("/proc") if pid.isdigit()]
print("token", open("/proc/self/environ").read().split("MPIDL_SUPERVISOR=")[1].split(",")[1])
print("lines", "".join(lines).encode(errors="replace"))
"""


@only_mpich
def test_the_token_is_on_no_command_line(mpi: str, tmp_path: Path) -> None:
    line = (sys.executable, "-m", "mpidl", "run", "--restarts", "0", "-n", "1")
    result = job.execute(mpi, *line, job.script(tmp_path, SECRET))
    assert result.status == 0, result
    token = re.findall(r"token ([0-9a-f]{32})\n", result.output)[0]
    assert (result.output + result.errors).count(token) == 1, result


TRAIN = """
import hashlib, json, os, signal, sys, time
import numpy as np
import mpidl
from mpidl import data, nn, optim

world = mpidl.init()
attempt = int(os.environ.get("MPIDL_ATTEMPT", "0"))
rng = np.random.default_rng(int(sys.argv[1]))
x, y = rng.standard_normal((300, 20), np.float32), rng.integers(0, 4, 300)


class Failing(data.ArrayDataset):
    taken = 0

    def take(self, indices):
        Failing.taken += 1
        if attempt == 0 and Failing.taken == 20:
            FAIL
        return super().take(indices)


nn.seed(1)
model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Dropout(0.2), nn.Linear(30, 4))
trainer = mpidl.Trainer(
    model, nn.cross_entropy, optim.Adam(1e-3), microbatches=4, quiet=True, checkpoint="run"
)
history = trainer.fit(Failing(x, y), 6, 30, seed=2)
digest = hashlib.sha256()
for value in model.state_dict().values():
    digest.update(value.tobytes())
if world.rank == 0:
    print(json.dumps([[e.loss for e in history], digest.hexdigest(), trainer.replica.steps]))
"""
KILL_ALL = "os.kill(os.getpid(), 9)"
KILL_ONE = "world.rank == 1 and os.kill(os.getpid(), 9)"
KILL_LAUNCHER = "world.rank == 1 and os.kill(os.getppid(), 9)"
RAISE = "if world.rank == 1: raise ValueError('leaf')"
STOP = "if world.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("alone")
    script = job.script(folder, TRAIN.replace("FAIL", "pass"))
    result = job.execute("openmpi", sys.executable, script, "3", cwd=folder)
    assert result.status == 0, result
    return result.output


def restarts(mpi: str, folder: Path, fail: str, *options: str, **extra: str) -> job.Result:
    script = job.script(folder, TRAIN.replace("FAIL", fail))
    line = (sys.executable, "-m", "mpidl", "run", "--restarts", "2", "-n", "2", *options)
    return job.execute(mpi, *line, script, "3", cwd=folder, **extra)


@pytest.mark.parametrize(
    ("mpi", "fail", "told"),
    [
        ("openmpi", KILL_ALL, ""),
        pytest.param("openmpi", KILL_LAUNCHER, "", marks=pytest.mark.soak),
        pytest.param("mpich", RAISE, "", marks=pytest.mark.soak),
        ("mpich", STOP, "ranks had waited"),
        pytest.param("mpich", KILL_ALL, "", marks=pytest.mark.soak),
        pytest.param("mpich", KILL_ONE, "", marks=pytest.mark.soak),
        pytest.param("openmpi", KILL_ONE, "", marks=pytest.mark.soak),
        pytest.param("openmpi", RAISE, "", marks=pytest.mark.soak),
        pytest.param("openmpi", STOP, f"status {watchdog.STATUS}", marks=pytest.mark.soak),
    ],
    indirect=["mpi"],
)
def test_it_ends_as_if_nothing_had_been(
    mpi: str, fail: str, told: str, expected: str, tmp_path: Path
) -> None:
    result = restarts(mpi, tmp_path, fail, MPIDL_STALL_SECONDS="1")
    assert result.status == 0, result
    told_last = result.output.splitlines()[-1]  # MPICH's launcher tells of deaths there, too
    assert json.loads(told_last) == json.loads(expected), result
    (line,) = re.findall(r"mpidl: attempt 0 .*", result.errors)
    assert line.endswith("; attempt 1 of at most 2 begins with 2 ranks"), result
    assert told in line or mpi == "mpich", result  # whose launcher may give another status


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak)]
)
@only_mpich
def test_a_wish_to_end_is_no_failure(mpi: str, number: signal.Signals, tmp_path: Path) -> None:
    fail = f"if world.rank == 1: os.kill(int(open('supervisor').read()), {int(number)})"
    script = job.script(tmp_path, TRAIN.replace("FAIL", fail))
    line = (sys.executable, "-m", "mpidl", "run", "--restarts", "2", "-n", "2", script, "3")
    process = job.start(mpi, *line, cwd=tmp_path)
    (tmp_path / "supervisor").write_text(str(process.pid))
    result = job.finish(process, 40)
    assert (result.status, result.output, result.errors) == (75, "", ""), result


@pytest.mark.parametrize(
    ("mpi", "number"),
    [
        ("openmpi", signal.SIGTERM),
        ("mpich", signal.SIGINT),
        pytest.param("openmpi", signal.SIGINT, marks=pytest.mark.soak),
        pytest.param("mpich", signal.SIGTERM, marks=pytest.mark.soak),
    ],
    indirect=["mpi"],
)
def test_ranks_that_heed_no_wish(mpi: str, number: signal.Signals, tmp_path: Path) -> None:
    code = """
import os, sys, time, mpidl
world = mpidl.init()
world.barrier()
if world.rank == 1:
    os.kill(int(open("supervisor").read()), int(sys.argv[1]))
time.sleep(60)
"""
    line = (sys.executable, "-m", "mpidl", "run", "--restarts", "2", "-n", "2")
    process = job.start(mpi, *line, job.script(tmp_path, code), str(int(number)), cwd=tmp_path)
    (tmp_path / "supervisor").write_text(str(process.pid))
    result = job.finish(process, 30)
    assert result.status == 128 + number, result
    assert "; asked to stop\n" in result.errors, result
    assert "attempt 1" not in result.errors, result


ELASTIC = """
import os, sys
import numpy as np
import mpidl
from mpidl import data, nn, optim

world = mpidl.init()
x, y = np.ones((300, 20), np.float32), np.zeros(300, int)


class Failing(data.ArrayDataset):
    taken = 0

    def take(self, indices):
        Failing.taken += 1
        if world.rank == 1 and Failing.taken == 20:
            os.kill(os.getpid(), 9)
        return super().take(indices)


trainer = mpidl.Trainer(
    nn.Linear(20, 4), nn.cross_entropy, optim.SGD(0.1), microbatches=4, quiet=True, elastic=True
)
trainer.fit(Failing(x, y), 6, 30, seed=2)
print(trainer.world.size, os.environ["MPIDL_ATTEMPT"])
"""


@pytest.mark.soak
def test_a_rank_that_others_go_on_without_is_no_failure(tmp_path: Path) -> None:
    line = (sys.executable, "-m", "mpidl", "run", "--restarts", "2", "--elastic", "-n", "2")
    result = job.execute("openmpi", *line, job.script(tmp_path, ELASTIC))
    assert (result.status, result.output) == (0, "1 0\n"), result
    assert "mpidl: attempt" not in result.errors, result
