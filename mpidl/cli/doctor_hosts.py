"""`mpidl doctor --hosts`: looks at each host, then at the network between those that are well."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mpidl.cli import doctor_findings as findings
from mpidl.cli import launcher, places
from mpidl.cli.doctor import EPILOGUE
from mpidl.cli.doctor_findings import PROBLEM, Finding
from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mpidl.cli.launcher import Library

HOST_SECONDS = 20.0  # that a host has to answer
JOB_SECONDS = 40.0  # for start, measurements and end
TRIES = 2  # seen: a TCP connection over a link that drops much may stand still for a minute
AT_ONCE = 16  # launchers
REACHED = "mpidl-reached"
WHY = re.compile(r"ssh: |denied|verification failed|not resolve|not known|No route|unreachable")


@dataclass
class Found:
    """Facts by host, what was measured between them, and what to think of it."""

    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {
            "hosts": self.hosts,
            "measured": self.measured,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def told(self, state: str) -> list[str]:
        """Return the findings of one state, with what to do, a line each."""
        return [f"{f.text}; {f.next}" for f in self.findings if f.state == state]


def examine(names: Sequence[str]) -> Found:
    """Look at these hosts. One that is not well is told of, and the others are still looked at."""
    found = Found()
    try:
        library = launcher.find()
        launcher.options(library, 1, {names[0]: 1})
    except MpidlError as error:
        found.findings.append(Finding(PROBLEM, "no launcher for other hosts", str(error)))
        return found
    failed: dict[str, tuple[str, str]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, answer in zip(names, pool.map(lambda n: _look(library, n), names), strict=True):
            if isinstance(answer, dict):
                found.hosts[name] = answer
            else:
                failed[name] = answer
    found.findings += findings.of_hosts(found.hosts, failed)
    able = _alike(found.hosts)
    if len(able) > 1:
        try:
            found.measured = _measure(library, able, TRIES)
            found.findings += findings.of_network(
                _in_order(able, found.measured["names"]), found.hosts, found.measured
            )
        except MpidlError as error:
            then = f"mpidl run --hosts {','.join(able)} tells more"
            found.findings.append(Finding(PROBLEM, f"no job over the hosts: {error}", then))
    return found


def _alike(hosts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the most hosts among which a job can run: those with the same mpidl and MPI."""
    groups: dict[object, list[str]] = {}
    for name, facts in hosts.items():
        if facts["mpi"] is not None:
            groups.setdefault((facts["mpidl"], facts["mpi"]), []).append(name)
    return max(groups.values(), key=len, default=[])


def _in_order(names: Sequence[str], told: Sequence[str]) -> list[str]:
    """Return the names of hosts in the order of ranks, which call them as `told`."""
    found = [places.host_of(one, "", names) for one in told]
    if None in found or len(set(found)) < len(found):
        return list(names)
    return [name for name in found if name is not None]


def _look(library: Library, name: str) -> dict[str, Any] | tuple[str, str]:
    """Return what is on a host; or why that is not known, and what to do."""
    # the shell tells that it was reached, also where there is no such Python
    line = f"echo {REACHED}; exec {shlex.quote(sys.executable)} -m mpidl.cli.doctor_host"
    where = {name: 1}
    try:
        environment = _environment(library, where)
        options = launcher.options(library, 1, where, environment)
        _, output, errors = _run([*options, "/bin/sh", "-c", line], environment, HOST_SECONDS)
    except MpidlError as error:
        return f"no answer: {error}", f"ssh {name} true must end without a question"
    told = next((text for text in output.splitlines() if text.startswith("{")), None)
    if told is not None:
        with suppress(ValueError):
            answer: dict[str, Any] = json.loads(told)
            return answer
    return why(name, errors, reached=REACHED in output)


def why(name: str, errors: str, *, reached: bool) -> tuple[str, str]:
    """Return why a host gave no facts, from what the launcher said, and what to do."""
    python = sys.executable
    if reached and "No module named" in errors and "mpidl" in errors:
        return f"no mpidl in {python}", f"on {name}: {python} -m pip install mpidl"
    if reached and re.search(r"not found|No such file|cannot execute|Permission denied", errors):
        return f"no Python at {python}", f"the same environment on {name}: a shared file system"
    missing = re.search(r"(prted|orted|hydra_\w+)\b.*(?:No such file|not found)", errors)
    if missing:
        return f"no {missing[1]} there", f"the same MPI on {name}: a shared file system"
    lines = EPILOGUE.split(errors, maxsplit=1)[0].strip().splitlines()
    every = [line.strip() for line in errors.splitlines() if line.strip(" -")]
    said = next((line for line in every if WHY.search(line)), (lines or every or [""])[-1])
    if reached:
        return f"its Python failed: {said}", f"on {name}: {python} -m mpidl.cli.doctor_host"
    return f"not reached: {said}", f"ssh {name} true must end well, and without a question"


def _measure(library: Library, names: Sequence[str], tries: int = 1) -> dict[str, Any]:
    """Run a rank on each host; if it fails, again, at most `tries` times. Raises MpidlError."""
    if tries > 1:
        with suppress(MpidlError):
            return _measure(library, names)
    where = dict.fromkeys(names, 1)
    environment = _environment(library, where)
    program = launcher.program(["mpidl.cli.doctor_pairs", "{}"], module=True)
    options = launcher.options(library, len(names), where, environment)
    status, output, errors = _run([*options, *program], environment, JOB_SECONDS)
    told = next((text for text in output.splitlines() if text.startswith("{")), None)
    if told is None:
        own = EPILOGUE.split(errors, maxsplit=1)[0].strip() or errors.strip()
        raise MpidlError((own.splitlines() or [f"it ended with status {status}"])[-1])
    report: dict[str, Any] = json.loads(told)
    return report


def _environment(library: Library, where: Mapping[str, int]) -> dict[str, str]:
    ranks = sum(where.values())
    return {
        **launcher.clean_environment(),
        **launcher.environment(library, ranks, where),
        "MPIDL_OVERSUBSCRIBE": "1",
    }


def _run(line: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str, str]:
    """Run it; return status, output and errors. Raises MpidlError where it takes too long."""
    with subprocess.Popen(
        line,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that ssh cannot ask the terminal for a password
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise MpidlError(f"no end within {seconds:g} s") from None
        finally:
            if process.poll() is None:
                places.kill(process)
    return process.returncode, os.fsdecode(output), os.fsdecode(errors)
