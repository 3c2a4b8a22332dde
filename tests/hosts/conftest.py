"""Several hosts on this machine, and jobs whose ranks are spread over them: see hosts.sh."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import job
from tests.conftest import SEED

SCRIPT = str(Path(__file__).with_name("hosts.sh"))
TOOLS = ("ip", "tc", "nsenter", "unshare")
PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# Each line is run in namespaces of its own, and leaves nothing.
TRIALS = {
    "hosts": "mount -t tmpfs tmpfs /dev/shm && hostname t0 && ip link add br0 type bridge"
    " && ip link add p0 type veth peer name eth0",
    "rate": "tc qdisc add dev lo root tbf rate 1gbit burst 256kb latency 50ms",
    "delay": "python3 -c \"open('/dev/net/tun', 'rb+', 0)\"",
    "loss": "tc qdisc add dev lo clsact"
    " && tc filter add dev lo ingress bpf da bytecode '1,6 0 0 4294967295'",
}
SPREAD = ("MPI4PY_LIBMPI", "MPIDL_", "OMP_NUM_THREADS", "OPENBLAS_", "PYTHON")  # beginnings
ENDING_SECONDS = 5  # a rank may live on for 2 s when its launcher has gone


@functools.cache
def problem(feature: str) -> str | None:
    """Return why this machine cannot have hosts with `feature`, a key of TRIALS."""
    if os.geteuid() != 0:
        return "several hosts on one machine take root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATHS) is None]
    if missing:
        return f"several hosts on one machine take {' and '.join(missing)}"
    line = ("unshare", "-n", "-u", "-i", "-m", "sh", "-c", TRIALS[feature])
    trial = subprocess.run(
        line, capture_output=True, text=True, check=False, env={**os.environ, "PATH": PATHS}
    )
    if not trial.returncode:
        return None
    said = trial.stderr.splitlines() or [f"{TRIALS[feature]}: {trial.returncode}"]
    return f"no {feature} here: {said[-1]}"


class Hosts:
    """Hosts t0, t1, ...; they go with `down`, or else with this process, however it ends.

    `rate` and `delay` are as in hosts.sh, of each link; `loss` is the share in percent of the
    packets that a host sends and nobody gets. Skips the test where this machine cannot do that.
    """

    def __init__(self, count: int, rate: str = "none", delay: str = "0", loss: float = 0) -> None:
        wanted = {"hosts": True, "rate": rate != "none", "delay": delay != "0", "loss": loss}
        for feature in (name for name, is_wanted in wanted.items() if is_wanted):
            if reason := problem(feature):
                pytest.skip(reason)
        self.names = [f"t{i}" for i in range(count)]
        # not below pytest's own folder: paths of sockets are short
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))
        self._environment = {**os.environ, "HOSTS_DIR": str(self.folder)}
        self._guard = subprocess.Popen(
            [SCRIPT, "guard", str(count), rate, delay],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests
        )
        try:
            assert self._guard.stdout is not None
            assert self._guard.stdout.readline() == "up\n", "hosts.sh says why"
            for name in self.names if loss else []:
                self.do("loss", name, str(loss))
        except BaseException:
            self.down()
            raise

    def do(self, *words: str) -> str:
        """Run `hosts.sh WORDS...`, such as ("cut", "t1"); return what it prints."""
        done = subprocess.run(
            [SCRIPT, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert not done.returncode, f"hosts.sh {' '.join(words)}: {done.stderr}"
        return done.stdout

    def pids(self) -> list[int]:
        """Return all processes on all hosts."""
        return [int(pid) for name in self.names for pid in self.do("pids", name).split()]

    def start(
        self,
        mpi: str,
        ranks: Sequence[int],
        *command: str,
        round_robin: bool = False,
        options: Sequence[str] = (),
        **extra: str,
    ) -> subprocess.Popen[str]:
        """Start `command` with ranks[i] ranks on host i, from t0.

        They are numbered host by host; round_robin: 0 on t0, 1 on t1, ..., which takes equally
        many on each. `options` are the launcher's, `extra` the environment.
        """
        assert not round_robin or len(set(ranks)) == 1
        used = self.names[: len(ranks)]
        settings = {
            "HOSTS_DIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_osc": "^ucx",  # these two as `mpidl run` does it
            "OMPI_MCA_mpi_yield_when_idle": "1",
            **extra,
        }
        line = [str(job.LAUNCHERS[mpi]), "-n", str(sum(ranks))]
        spread = ",".join(f"{name}:{count}" for name, count in zip(used, ranks, strict=True))
        if mpi == "openmpi":
            line += ["--host", spread, "--bind-to", "none"]
            line += ["--map-by", "node"] if round_robin else []
            names = [name for name in job.environment(mpi, **settings) if name.startswith(SPREAD)]
            line += [word for name in sorted({*names, *extra}) for word in ("-x", name)]
        else:
            line += ["-hosts", ",".join(used), "-ppn", "1"] if round_robin else ["-hosts", spread]
        # counting lines takes as long as the tests themselves, and tests/ranks has counted most
        uncounted = ("env", "-u", "COVERAGE_PROCESS_CONFIG", "-u", "COVERAGE_PROCESS_START")
        line = [SCRIPT, "run", "t0", *uncounted, *line, *options, *command]
        return job.start(mpi, *line, **settings)

    def finish(self, process: subprocess.Popen[str], timeout: float = 60) -> job.Result:
        """Wait for the end of a job; after `timeout` seconds kill it, and fail. No orphans."""
        begin = time.monotonic()
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # the launcher may tell what it knows
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            self.kill()
            output, errors = process.communicate()
            raise AssertionError(f"no end after {timeout} s:\n{output}\n{errors}") from None
        result = job.Result(process.returncode, output, errors, time.monotonic() - begin)
        end = time.monotonic() + ENDING_SECONDS
        while left := self.pids():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"processes {left} outlived their job: {result}")
            time.sleep(0.05)
        return result

    def run(
        self, mpi: str, ranks: Sequence[int], *command: str, timeout: float = 60, **how: Any
    ) -> job.Result:
        """Start `command` and wait for its end: see `start` and `finish`."""
        return self.finish(self.start(mpi, ranks, *command, **how), timeout)

    def run_bodies(
        self, mpi: str, ranks: Sequence[int], folder: Path, *selection: str, **how: Any
    ) -> job.Result:
        """Run test bodies of tests/ranks on the hosts; `selection` is pytest's arguments."""
        # -m mpi4py and -x: the first failure on any rank ends all ranks at once
        line = (sys.executable, "-m", "mpi4py", "-m", "pytest", "-x", "-q", "--color=no")
        line += ("-p", "no:cacheprovider", "--timeout=60", *selection)
        settings = {
            "MPIDL_TEST_RANKS": "1",
            "MPIDL_TEST_DEVICE": "cpu",
            "MPIDL_TEST_TMP": str(folder),
            "MPIDL_TEST_SEED": str(SEED),
        }
        return self.run(mpi, ranks, *line, timeout=120, **settings, **how)

    def kill(self) -> None:
        """Kill all that runs on the hosts; the hosts themselves stay."""
        for name in self.names:
            self.do("kill", name)

    def down(self) -> None:
        """Kill everything, and leave nothing."""
        self._guard.communicate()  # ends its standard input, and waits
        shutil.rmtree(self.folder, ignore_errors=True)


Up = Callable[..., Hosts]


@pytest.fixture
def hosts() -> Iterator[Up]:
    """Bring hosts up, as `hosts(2, rate="1gbit", delay="5ms", loss=1)`; all go with the test."""
    made = contextlib.ExitStack()

    def up(count: int, **how: Any) -> Hosts:
        found = Hosts(count, **how)
        made.callback(found.down)
        return found

    with made:
        yield up
