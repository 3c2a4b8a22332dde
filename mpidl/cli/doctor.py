"""`mpidl doctor`: one screen on what is there, and what to do about what is not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import mpidl
from mpidl import cores
from mpidl.cli import launcher
from mpidl.cli.told import wrapped
from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from mpidl.cli.doctor_hosts import Found

PROBE = launcher.program(["mpidl.cli.probe"], module=True)
PROBE_RANKS = 2
PROBE_SECONDS = 20
EPILOGUE = re.compile(r"^(?:-{20}|Abort\()", re.MULTILINE)  # what a launcher says of a failed rank
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


@dataclass
class Report:
    """What was found. `problems` keep training from working; `advice` does not."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether training on several ranks works here."""
        return not self.problems


def examine() -> Report:
    """Look at this machine and environment. Starts MPI only in child processes."""
    report = Report()
    facts = report.facts
    facts["mpidl"] = mpidl.__version__
    facts["python"] = f"{platform.python_version()} ({sys.executable})"
    facts["numpy"] = np.__version__
    facts["mpi4py"] = _version("mpi4py")
    facts["cores"] = cores.available()
    facts["omp_num_threads"] = os.environ.get("OMP_NUM_THREADS")
    facts["inside"] = [name for name in LAUNCHERS if name in os.environ]
    _mpi(report)
    _gpu(report)
    return report


def _mpi(report: Report) -> None:
    facts = report.facts
    facts.update(mpi=None, mpi_library=None, launcher=None, thread_level=None, ranks_per_node=None)
    try:
        library = launcher.query()
        facts.update(mpi=library.version, mpi_library=library.path, launcher=library.launcher)
        launcher.check(library)
    except MpidlError as error:
        report.problems.append(str(error))
        return
    line = [*launcher.options(library, PROBE_RANKS), *PROBE]
    environment = {**launcher.clean_environment(), **launcher.environment(library, PROBE_RANKS)}
    probe = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        output, errors = probe.communicate(timeout=PROBE_SECONDS)
        end = f"two ranks failed (exit status {probe.returncode})"
    except subprocess.TimeoutExpired:
        probe.kill()  # Open MPI's may hang after a failed MPI_Init, and heeds no SIGTERM then
        output, errors = probe.communicate()
        end = f"two ranks did not end within {PROBE_SECONDS} s"
    told = next((text for text in output.splitlines() if text.startswith("{")), None)
    if probe.returncode or told is None:
        said = errors or output
        own = EPILOGUE.split(said, maxsplit=1)[0].strip()
        reason = "\n".join((own or said.strip()).splitlines()[-8:])
        report.problems.append(f"{end}:\n{reason}")
        report.advice.append(f"to see all of it: {shlex.join(line)}")
        return
    found = json.loads(told)
    facts["thread_level"] = found["thread_level"]
    facts["ranks_per_node"] = f"{found['ranks_per_node']} of {found['ranks']} in a trial run"
    facts["cuda_aware"] = found["cuda_aware"]
    facts["says_cuda_aware"] = found.get("says_cuda_aware")
    facts["strategy"] = found["strategy"]
    report.advice.extend(found["warnings"])
    if found["ranks"] != PROBE_RANKS or not found["allreduce_works"]:
        report.problems.append(f"two ranks were asked for, and this came: {found}")
    if found["thread_level"] != "multiple":
        report.advice.append("MPI has no MPI_THREAD_MULTIPLE: averaging cannot overlap backward")


def _gpu(report: Report) -> None:
    facts = report.facts
    facts["cupy"] = _version("cupy-cuda12x") or _version("cupy-cuda13x") or _version("cupy")
    facts["gpus"] = []
    driver = os.path.exists("/proc/driver/nvidia/version")  # noqa: PTH110
    if facts["cupy"] is None:
        if driver:
            report.advice.append(
                "an NVIDIA driver is loaded, but CuPy is missing: pip install 'mpidl[cuda12]'"
            )
        return
    code = (
        "import cupy, json; r = cupy.cuda.runtime; print(json.dumps([r.getDeviceProperties(i)"
        "['name'].decode() for i in range(r.getDeviceCount())]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        facts["gpus"] = json.loads(result.stdout)
    elif driver:
        report.advice.append(f"CuPy finds no GPU: {result.stderr.strip().splitlines()[-1]}")
    measured = str(facts.get("cuda_aware"))
    if facts["gpus"] and not measured.startswith("yes"):
        report.advice.append(
            f"MPI is not CUDA-aware: {measured}; between nodes GPU arrays travel through pinned "
            "host memory"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


LABELS = {
    "mpidl": "mpidl",
    "python": "Python",
    "numpy": "NumPy",
    "mpi4py": "mpi4py",
    "mpi": "MPI",
    "mpi_library": "MPI library",
    "launcher": "launcher",
    "thread_level": "thread level",
    "ranks_per_node": "ranks per node",
    "strategy": 'strategy "auto"',
    "cores": "cores",
    "omp_num_threads": "OMP_NUM_THREADS",
    "inside": "started by",
    "cupy": "CuPy",
    "gpus": "GPUs",
    "cuda_aware": "CUDA-aware MPI",
    "says_cuda_aware": "which it says",
}


def show(report: Report, *, as_json: bool, found: Found | None = None) -> None:
    """Print the report, and what was `found` on other hosts, as JSON or for a person."""
    if as_json:
        told = asdict(report)
        if found is not None:
            told["problems"] += found.told("problem")
            told["advice"] += found.told("warning")
            told |= found.as_json()
        print(json.dumps({**told, "healthy": not told["problems"]}, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True, emoji=False)
    table = Table(show_header=False, box=None)
    for key, label in LABELS.items():
        value = report.facts.get(key)
        shown = ", ".join(_counted(value)) if isinstance(value, list) else value
        table.add_row(
            f"[bold]{label}[/]", escape(str(shown)) if shown not in (None, "") else "none"
        )
    console.print(table)

    def tell(word: str, colour: str, told: str) -> None:
        console.print(f"[bold {colour}]{word}[/]{escape(told.removeprefix(word))}")

    for text in report.problems:
        tell("problem", "red", wrapped(text, "problem ", " " * 8))
    for text in report.advice:
        tell("advice", "yellow", wrapped(text, "advice  ", " " * 8))
    for finding in found.findings if found is not None else ():
        colour = {"ok": "green", "warning": "yellow"}.get(finding.state, "red")
        tell(finding.state, colour, finding.lines)
    healthy = report.healthy and not (found and found.told("problem"))
    if healthy and found is not None:
        where = ",".join(found.hosts)
        tell("ready", "green", wrapped(f"mpidl run --hosts {where} SCRIPT will work", "ready   "))
    elif healthy:
        tell("ready", "green", "ready   mpidl run -n 2 SCRIPT will work here")


def _counted(values: list[Any]) -> list[str]:
    """Return values as words; of equal ones, such as a host's GPUs, how many there are."""
    counts = Counter(map(str, values))
    return [value if count == 1 else f"{count} x {value}" for value, count in counts.items()]
