"""The hosts themselves: that they are apart, that links are as asked for, and that all goes."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import job
from tests.conftest import SHARED_MEMORY
from tests.hosts import conftest
from tests.hosts.conftest import SCRIPT, TRIALS, Hosts, Up, problem

SEND = """
import socket, sys
link = socket.create_connection(("t1", 7000))
link.sendall(bytes(int(sys.argv[1])))
link.recv(1)
"""
# Prints bits per second. The first 1 MB does not count: a link lets a burst through, at any rate.
RECEIVE = """
import socket, sys, time
server = socket.create_server(("", 7000))
print("ready", flush=True)
link = server.accept()[0]
left, begin = int(sys.argv[1]), None
while left:
    left -= len(link.recv(min(left, 1 << 20)))
    if begin is None and left <= int(sys.argv[1]) - 1_000_000:
        begin, counted = time.perf_counter(), left
print(8 * counted / (time.perf_counter() - begin))
"""
ECHO = """
import socket
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("", 7000))
print("ready", flush=True)
while True:
    server.sendto(*server.recvfrom(100))
"""
# Prints how many of the packets came back, and the least seconds for both ways. Many at once must
# fit into a socket's buffer.
PING = """
import socket, sys, time
count, at_once, patience = map(float, sys.argv[1:])
link = socket.socket(type=socket.SOCK_DGRAM)
link.connect(("t1", 7000))
link.settimeout(patience)
came, least = 0, 1e9
for _ in range(int(count / at_once)):
    begin = time.perf_counter()
    for _ in range(int(at_once)):
        link.send(b"x")
    try:
        for _ in range(int(at_once)):
            link.recv(1)
            came, least = came + 1, min(least, time.perf_counter() - begin)
    except TimeoutError:
        pass
print(came, least)
"""
PYTHON = (sys.executable, "-IS", "-c")  # without packages: it starts sooner


def on(hosts: Hosts, name: str, code: str, *arguments: object) -> str:
    """Run Python code on a host, and return what it prints."""
    return hosts.do("run", name, *PYTHON, code, *map(str, arguments))


class Server:
    """Python code that runs on t1 in this context, and prints "ready" when it is."""

    def __init__(self, hosts: Hosts, code: str, *arguments: object) -> None:
        line = [SCRIPT, "run", "t1", *PYTHON, code, *map(str, arguments)]
        environment = {**os.environ, "HOSTS_DIR": str(hosts.folder)}
        self.process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def bits_per_second(hosts: Hosts, size: int) -> float:
    with Server(hosts, RECEIVE, size) as server:
        sender = [SCRIPT, "run", "t0", *PYTHON, SEND, str(size)]
        environment = {**os.environ, "HOSTS_DIR": str(hosts.folder)}
        with subprocess.Popen(sender, env=environment):
            return float(server.communicate(timeout=30)[0])


def ping(hosts: Hosts, count: int, at_once: int = 1, patience: float = 1) -> tuple[int, float]:
    """From t0 to t1 and back: how many packets came, and the least time in seconds."""
    with Server(hosts, ECHO):
        came, least = on(hosts, "t0", PING, count, at_once, patience).split()
    return int(came), float(least)


def left_of(folder: Path) -> list[str]:
    """Return what is left of hosts: their folder, mounts below it, processes that name it."""
    found = [str(folder)] if folder.exists() else []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "mountinfo"):
            try:
                text = (process / name).read_text()
            except OSError:  # it has ended
                continue
            found += [f"{process / name}: {text}"] if str(folder) in text else []
    return found


def namespaces() -> set[int]:
    """Return the networks of all processes."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has ended
            found.add(link.stat().st_ino)
    return found


def test_each_is_a_machine_of_its_own(hosts: Up) -> None:
    interfaces = socket.if_nameindex()
    three = hosts(3)
    for name in three.names:
        mine = three.do(
            "run", name, "sh", "-c", f"echo {name} > /dev/shm/mpidl; hostname; ip -o link"
        )
        assert mine.splitlines()[0] == name
        assert len(mine.splitlines()) == 3  # lo and eth0
    for name in three.names:
        assert three.do("run", name, "cat", "/dev/shm/mpidl") == f"{name}\n"
    assert not (SHARED_MEMORY / "mpidl").exists()
    assert socket.if_nameindex() == interfaces
    assert socket.gethostname() not in three.names


def test_two_sets_at_once(hosts: Up) -> None:
    first, second = hosts(2), hosts(2)
    first.do("kill", "t1")
    second.do("cut", "t1")
    assert ping(first, 3)[0] == 3
    second.down()
    assert ping(first, 3)[0] == 3


def test_rate(hosts: Up) -> None:
    """Of a plain TCP connection; packets of 1514 bytes carry 1448, hence 0.956 of it at most."""
    two = hosts(2, rate="100mbit")
    assert bits_per_second(two, 4_000_000) == pytest.approx(95.6e6, rel=0.15)
    two.do("rate", "t1", "40mbit")
    assert bits_per_second(two, 2_500_000) == pytest.approx(38.2e6, rel=0.15)
    two.do("rate", "t0", "none")
    two.do("rate", "t1", "none")
    assert bits_per_second(two, 50_000_000) > 200e6


def test_delay(hosts: Up) -> None:
    came, least = ping(hosts(2, delay="5ms"), 30)
    assert came == 30
    assert 0.010 <= least < 0.015
    assert ping(hosts(2), 30)[1] < 0.005


def test_loss(hosts: Up) -> None:
    """30 % are to be lost; the bounds are 6 standard deviations away."""
    two = hosts(2)
    assert ping(two, 400, 100)[0] == 400
    two.do("loss", "t0", "30")
    assert abs(ping(two, 400, 100, 0.3)[0] - 280) < 6 * math.sqrt(400 * 0.3 * 0.7)
    two.do("loss", "t0", "0")
    assert ping(two, 400, 100)[0] == 400
    assert ping(hosts(2, loss=100), 10, 10, 0.1)[0] == 0


def test_cut_heal_and_crash(hosts: Up) -> None:
    two = hosts(2)
    with Server(two, ECHO) as server:
        assert on(two, "t0", PING, 1, 1, 1).split()[0] == "1"
        two.do("cut", "t1")
        assert on(two, "t0", PING, 1, 1, 0.2).split()[0] == "0"
        two.do("heal", "t1")
        assert on(two, "t0", PING, 1, 1, 1).split()[0] == "1"
        assert two.pids() == [server.pid]
        two.do("crash", "t1")
        assert server.wait(5) == -signal.SIGKILL
    assert two.pids() == []


def test_down_leaves_nothing() -> None:
    before = namespaces()
    two = Hosts(2, delay="0" if problem("delay") else "1ms")
    assert left_of(two.folder)
    made = namespaces() - before
    with Server(two, ECHO):
        two.down()
    assert left_of(two.folder) == []
    assert not namespaces() & made


def test_they_go_with_the_process_that_made_them() -> None:
    """Also where it has no time to clear up: pytest-timeout ends it at once."""
    if reason := problem("hosts"):
        pytest.skip(reason)
    code = (
        "import os; from tests.hosts.conftest import Hosts;"
        "os.write(1, str(Hosts(2).folder).encode()); os.kill(os.getpid(), 9)"
    )
    folder = Path(job.execute(None, sys.executable, "-c", code).output)
    assert folder.name.startswith("hosts-")
    end = time.monotonic() + 20
    while left := left_of(folder):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def test_hosts_that_do_not_start_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if reason := problem("rate"):
        pytest.skip(reason)
    folder = tmp_path / "h"
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(folder))
    with pytest.raises(AssertionError, match="says why"):
        Hosts(2, rate="fast")
    assert "no rate fast" in capfd.readouterr().err
    assert left_of(folder) == []


def test_what_a_machine_cannot_do_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := problem("hosts"):
        pytest.skip(reason)
    monkeypatch.setitem(TRIALS, "loss", "echo 'Unknown qdisc' >&2; false")
    problem.cache_clear()
    try:
        with pytest.raises(pytest.skip.Exception, match=r"^no loss here: Unknown qdisc$"):
            Hosts(2, loss=1)
    finally:
        problem.cache_clear()


ORPHAN = "setsid sleep 60 < /dev/null > /dev/null 2>&1 &"


def test_a_job_that_ends(mpi: str, hosts: Up) -> None:
    two = hosts(2)
    # prterun, once in very many times, does not notice the end of what ends as soon as it began
    result = two.run(mpi, [1, 1], "bash", "-c", "sleep 0.5; echo $WHO", WHO="me")
    assert (result.status, result.output) == (0, "me\nme\n"), result


@pytest.mark.parametrize("mpi", ["openmpi"], indirect=True)  # MPICH's launcher waits for it
def test_a_job_that_leaves_a_process(mpi: str, hosts: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "ENDING_SECONDS", 1)
    two = hosts(2)
    with pytest.raises(AssertionError, match="outlived their job"):
        two.run(mpi, [1, 1], "bash", "-c", ORPHAN)
    assert two.pids() == []


def test_a_job_that_does_not_end(mpi: str, hosts: Up) -> None:
    two = hosts(2)
    with pytest.raises(AssertionError, match=r"no end after 1\.5 s"):
        two.run(mpi, [1, 1], "bash", "-c", f"{ORPHAN} sleep 60", timeout=1.5)
    assert two.pids() == []
