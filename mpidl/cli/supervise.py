"""`mpidl run --restarts`: starts a run again, on the hosts that are left, until it is complete.

A launcher cannot outlive a host, tells success where one has died, and hangs where one falls
silent (Open MPI 5.0.11, MPICH 5.0.2). So its exit status decides nothing. Complete is a run when
as many ranks as its world has have told here that they have come to their end: see
mpidl/supervised.py, and for what is told, mpidl/cli/listener.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from mpidl import config, lease, watchdog
from mpidl.cli import attend, launcher, places
from mpidl.cli.asked import Signals
from mpidl.cli.listener import Listener
from mpidl.cli.verdict import Vain, Verdict, completed, told_of_lost
from mpidl.lease import PING_SECONDS, clock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpidl.cli.launcher import Library
    from mpidl.cli.listener import Member

NEWS_SECONDS = 1.0  # for what ranks have told before the launcher ended
TERM_SECONDS = 1.0  # that it has to end when it is told to
END_SECONDS = 60.0  # and when its ranks have come to their end: MPI_Finalize may hang
GONE_SECONDS = 3.0  # and when they are gone
PROBE_SECONDS = 6.0  # that a host has to start a command
CLEAN_SECONDS = 5.0
MARGIN_SECONDS = 0.5  # beyond a lease: clocks of two hosts, and a thread's delay
WORDS = {
    watchdog.STATUS: "ranks had waited for others for too long",
    lease.STATUS: "ranks had lost their supervisor",
}


@dataclass(frozen=True)
class Job:
    """What to run, and how often.

    `hosts` are those with their ranks; None where all run here, `ranks` of them.
    """

    library: Library
    program: Sequence[str]
    ranks: int
    restarts: int
    hosts: dict[str, int] | None = None
    least: int = 1  #: ranks, below which it is given up
    elastic: bool = False
    replace: bool = False
    launcher_args: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)  #: more of the environment
    cores: int | None = None  #: of a host, where it is known

    def line(self, hosts: dict[str, int] | None, environment: dict[str, str]) -> list[str]:
        """Return the command line. Raises InvalidArgument."""
        ranks = self.ranks if hosts is None else sum(hosts.values())
        options = launcher.options(
            self.library, ranks, hosts, environment, elastic=self.elastic, replace=self.replace
        )
        return [*options, *self.launcher_args, *self.program]


def run(job: Job) -> int:
    """Run it, and return the exit status."""
    with ExitStack() as stack:
        signals = Signals()
        stack.callback(signals.close)
        supervisor = _Supervisor(job, signals)
        stack.callback(supervisor.close)
        return supervisor.run()


@final
class _Supervisor:
    def __init__(self, job: Job, signals: Signals) -> None:
        self.job, self.signals = job, signals
        self.run_id, token = os.urandom(8).hex(), os.urandom(16).hex()
        self.lease, self.silence = config.lease_seconds(), config.silent_seconds()
        others = [name for name in job.hosts or () if not places.is_here(name)]
        self.listener = Listener(token, everywhere=bool(others), most=4 * job.ranks + 64)
        self.listener.wake_by(signals.woken)
        self.addresses = places.addresses(others) if others else ["127.0.0.1"]
        self.token = token
        self.process: subprocess.Popen[bytes] | None = None
        self.status = 0  # the launcher's
        self.vain = Vain()
        self.reported = False  # whether any rank ever has

    def run(self) -> int:
        hosts = self.job.hosts
        for attempt in range(self.job.restarts + 1):
            begin = clock()
            self._start(attempt, hosts)
            reason = self._watch(hosts)
            complete = completed(self.listener.members)
            if complete is not None or not reason:
                self._let_end()
                self._end(hosts, everywhere=False)
                return self.status if complete is None else complete
            self.listener.end()
            told = f"mpidl: attempt {attempt} ended after {clock() - begin:.1f} s: {reason}"
            steps = max((member.steps for member in self.listener.members), default=0)
            seconds = clock() - begin
            left = self._settle()
            gone = sorted(set(hosts or ()) - set(left or ()))
            if any(name not in reason for name in gone):
                told += f"; no answer from {', '.join(gone)}"
            vain = self.vain.add(steps, seconds, hosts_lost=bool(gone))
            hosts = left
            ranks = self.job.ranks if hosts is None else sum(hosts.values())
            failure = self.status if self.status > 0 else 1
            given_up = ""
            if self.signals.asked is not None:
                given_up, failure = "asked to stop", 128 + self.signals.asked
            elif ranks < self.job.least:
                given_up = f"given up: {ranks} ranks are left, and --min-ranks is {self.job.least}"
            elif attempt == self.job.restarts:
                given_up = f"given up: --restarts is {self.job.restarts}"
            elif vain:
                given_up = f"given up: {vain}"
            if given_up:
                _say(f"{told}; {given_up}")
                self._end(hosts, everywhere=True)
                return failure
            where = f" on {', '.join(hosts)}" if hosts else ""
            s = "s" * (ranks != 1)
            _say(
                f"{told}; attempt {attempt + 1} of at most {self.job.restarts} begins with "
                f"{ranks} rank{s}{where}"
            )
        raise AssertionError("the last attempt returns")

    def _start(self, attempt: int, hosts: dict[str, int] | None) -> None:
        job = self.job
        ranks = job.ranks if hosts is None else sum(hosts.values())
        environment = {
            **os.environ,
            **launcher.environment(job.library, ranks, hosts, job.cores),
            **job.settings,
            "MPIDL_RUN": self.run_id,
            "MPIDL_ATTEMPT": str(attempt),
            "MPIDL_SUPERVISOR": ",".join([str(self.listener.port), self.token, *self.addresses]),
        }
        self.status = 0
        self.listener.begin(attempt)
        parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

        def begin() -> None:
            prctl(attend.PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        sys.stdout.flush()
        self.verdict = Verdict(elastic=job.elastic, ranks=ranks, silence=self.silence)
        self.process = subprocess.Popen(
            job.line(hosts, environment),
            env=environment,
            stdin=subprocess.DEVNULL,  # what one attempt has read the next could not
            preexec_fn=begin,  # one thread: it may be so
            start_new_session=True,  # so that all of it on this host can be found, and killed
        )

    def _watch(self, hosts: dict[str, int] | None) -> str:
        """Wait for the end of an attempt. Returns why it failed; nothing where it did not."""
        assert self.process is not None
        listener, ended, alone, due = self.listener, 0.0, 0, clock()
        while True:
            listener.look(max(0.0, due - clock()))
            self._pass_signals_on()
            if completed(listener.members) is not None:
                return ""
            now = clock()
            if not ended and self.process.poll() is not None:
                ended, due = now, now
            if now < due:
                continue
            due = now + (0.05 if ended else PING_SECONDS)
            listener.tick()
            self.reported = self.reported or bool(listener.members)
            if ended:
                living = any(member.lives for member in listener.members)
                if living and now - ended < NEWS_SECONDS:
                    continue
                return self._reason_of_end(hosts)
            reason = self.verdict.reason(listener.members, now)
            if self.signals.again and self.signals.asked == signal.SIGINT:
                reason = "asked to stop, twice"
            if not reason and not listener.members:
                alone = self._alone(alone)
                if alone * PING_SECONDS > attend.LOOKS * attend.LOOK_SECONDS:
                    reason = "the launcher did not end after its ranks"
            if reason:
                return reason

    def _alone(self, before: int) -> int:
        """Return for how many looks the launcher has had no ranks, after it had some."""
        assert self.process is not None
        if attend.has_children(self.process.pid):
            return 1
        return before + 1 if before else 0

    def _reason_of_end(self, hosts: dict[str, int] | None) -> str:
        """Return why an attempt failed whose launcher has ended; nothing where it did not.

        Where no rank has ever reported, this may be a script without mpidl, of which the status is
        all that is known; unless a host has gone, of which launchers tell success.
        """
        assert self.process is not None
        code = self.process.returncode
        self.status = code if code >= 0 else 128 - code
        if not self.reported and code in (0, config.EXIT_REQUEUE) and self._all_answer(hosts):
            _say("mpidl: no rank reported, as one does that calls mpidl.init(): its launcher's "
                 "status is all that is known of this run")  # fmt: skip
            return ""
        members = self.listener.members
        well = sum(member.status is not None for member in members)
        told = f"the launcher ended with status {self.status}"
        told = f"{WORDS[self.status]} (status {self.status})" if self.status in WORDS else told
        if self.signals.asked is not None:
            return f"{told} after signal {self.signals.asked}"
        lost = [member for member in members if member.closed and member.status is None]
        if well:
            told += f"; {well} of {len(members)} ranks had come to their end"
        elif lost and self.status not in WORDS:
            told += f"; {told_of_lost(lost)}"
        return told if members or self.reported else f"{told} before any rank reported"

    def _all_answer(self, hosts: dict[str, int] | None) -> bool:
        others = [name for name in hosts or () if not places.is_here(name)]
        errand = places.Errand(self.job.library, others, ["true"], clock() + PROBE_SECONDS)
        while not errand.done(clock()):
            self.listener.look(0.05)
        return errand.answered == set(others)

    def _settle(self) -> dict[str, int] | None:
        """End all that is left of an attempt, and return the hosts that still answer.

        Returns when no rank of it has a lease any more: so never do two attempts train or write.
        """
        members = list(self.listener.members)
        now = clock()
        others = {name for name in self.job.hosts or () if not places.is_here(name)}
        silent: set[str] = set()
        sound: set[str] = set()
        for member in members:
            name = places.host_of(member.host, member.address, others)
            if name is not None and member.lives:
                (silent if now - member.heard > self.silence else sound).add(name)
        self._kill_launcher()
        errand = places.Errand(
            self.job.library, others - silent - sound, ["true"], clock() + PROBE_SECONDS
        )
        try:
            while not errand.done(clock()) or any(self._may_live(m) for m in members):
                self.listener.look(0.05)
                if self.signals.asked is not None:
                    break
        finally:
            errand.stop()
        answered = (errand.answered | sound) - silent - places.down_in_slurm(others)
        return _left(self.job.hosts, answered)

    def _may_live(self, member: Member) -> bool:
        """Return whether a rank may still have a lease: its process is not known to have ended."""
        if member.closed == "closed":  # by its system: a rank itself never does it
            return False
        if member.host == socket.gethostname() and not places.runs(member.process):
            return False
        return clock() < member.answered + self.lease + MARGIN_SECONDS

    def _kill_launcher(self) -> None:
        assert self.process is not None
        before = places.family(self.process)
        if self.process.poll() is None:
            self.process.terminate()
            self._wait_for_launcher(TERM_SECONDS)
        places.kill(self.process, before)

    def _let_end(self) -> None:
        """Wait for the end of a launcher whose ranks have come to theirs."""
        assert self.process is not None
        end = clock() + END_SECONDS
        while self.process.poll() is None and clock() < end:
            if all(member.closed for member in self.listener.members):
                end = min(end, clock() + GONE_SECONDS)
            self.listener.look(PING_SECONDS)
            self._pass_signals_on()

    def _wait_for_launcher(self, seconds: float) -> None:
        assert self.process is not None
        end = clock() + seconds
        while self.process.poll() is None and clock() < end:
            self.listener.look(0.02)
            self._pass_signals_on()

    def _pass_signals_on(self) -> None:
        assert self.process is not None
        for number in self.signals.take():
            passed = number
            if number == signal.SIGTERM and self.job.library.vendor == "openmpi":
                # mpirun leaves ranks a quarter of a second after SIGTERM: see `attend`
                passed = signal.SIGTERM if self.signals.again else signal.SIGUSR1
            if self.process.poll() is None:
                with suppress(ProcessLookupError):
                    self.process.send_signal(passed)

    def _end(self, hosts: dict[str, int] | None, *, everywhere: bool) -> None:
        """Leave nothing behind. Elsewhere as far as it goes: those that ended well left nothing."""
        self.listener.end()
        assert self.process is not None
        if everywhere or self.process.poll() is None:
            places.kill(self.process)
        places.remove_snapshots(self.run_id)
        if everywhere and hosts:
            others = [name for name in hosts if not places.is_here(name)]
            command = places.removing_snapshots(self.run_id)
            errand = places.Errand(self.job.library, others, command, clock() + CLEAN_SECONDS)
            while not errand.done(clock()):
                self.listener.look(0.05)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            places.kill(self.process)
        self.listener.close()


def _left(hosts: dict[str, int] | None, answered: set[str]) -> dict[str, int] | None:
    if hosts is None:
        return None
    return {name: n for name, n in hosts.items() if places.is_here(name) or name in answered}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
