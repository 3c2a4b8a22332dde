"""Kubernetes with the MPI operator: kubectl, and an MPIJob (kubeflow.org/v2beta1)."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from mpidl.cli.schedulers import base
from mpidl.cli.schedulers.base import SchedulerFailed, State
from mpidl.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

    from mpidl.cli.job import Job

LAUNCHER_ARGS = "--hostfile /etc/mpi/hostfile -x MPIDL_OUT -x OMP_NUM_THREADS"
VOLUME = "/runs"  # where the template mounts it
STATES = {"Created": "queued", "Suspended": "queued", "Restarting": "queued",
          "Running": "running", "Succeeded": "finished", "Failed": "failed"}  # fmt: skip


class Kubernetes:
    """`launch/mpijob.yaml`. The pod of the launcher is started again after status 75."""

    program = "kubectl"
    script = "job.yaml"

    def seconds(self, time: str) -> int:
        """Return the time limit, in seconds: of the MPIJob, which is not started again after it."""
        return base.limit(time, (3600, 60, 1), "seconds, M:SS or H:MM:SS")

    def check(self, job: Job) -> None:
        """Raise InvalidArgument for what an MPIJob cannot be."""
        if job.container is None:
            raise InvalidArgument("container: expected the image, such as registry/mpidl:latest")
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,44}[a-z0-9])?", job.folder.name):
            raise InvalidArgument(
                f"{job.folder.name!r}: Kubernetes expects at most 46 of a-z, 0-9 and -, beginning "
                "with a letter; choose another --name"
            )
        unknown = [n for n in ("array", "account", "partition") if getattr(job, n) is not None]
        if unknown or job.options or job.environment:
            what = [*unknown, *["options"] * bool(job.options)]
            what += ["modules, setup or environment"] * bool(job.environment)
            raise InvalidArgument(f"{', '.join(what)}: an MPIJob has none; change the file by hand")

    def render(self, job: Job, templates: Path) -> str:
        """Return the MPIJob. JSON's strings and lists are YAML's too."""
        start = ["mpidl", "run", "-n", str(job.ranks), "--launcher-args", LAUNCHER_ARGS]
        name = job.folder.name  # names are taken once
        values = {
            "name": json.dumps(name),
            "slotsPerWorker": str(job.ranks_per_node),
            "image": json.dumps(job.container),
            "command": json.dumps(list(job.launcher or start)),
            "args": json.dumps(list(job.command)),
            "nvidia.com/gpu": str(job.gpus_per_node),
            "cpu": str(job.ranks_per_node * job.cpus_per_rank),
        }
        places = {  # what stands only once under its own name
            "- name: MPIDL_OUT": json.dumps(f"{VOLUME}/{name}"),
            "- name: OMP_NUM_THREADS": json.dumps(str(job.cpus_per_rank)),
        }
        lines, part, value = [], "", None
        text = (templates / "mpijob.yaml").read_text()
        text = re.sub(r',\n\s+"', ', "', text)  # a list on one line
        for line in text.splitlines():
            found = re.fullmatch(r"(\s*)(- )?([\w./]+):( +)([^#]*?)(\s+#.*)?", line)
            section = re.fullmatch(r"    (Launcher|Worker):", line)
            part = section[1] if section else part
            mark = line.split("#")[0].strip()
            value = places.get(mark, value)
            if found is None or found[2] or not found[5]:
                lines.append(line)
                continue
            indent, _, key, gap, _, comment = found.groups()
            new = values.get(key)
            if key == "name" and indent != "  ":
                new = None  # of a container or a volume
            elif key == "command" and part == "Worker":
                new = None  # sshd
            elif key == "replicas" and part == "Worker":
                new = str(job.nodes)
            elif key == "value" and value is not None:
                new, value = value, None
            lines.append(line if new is None else f"{indent}{key}:{gap}{new}{comment or ''}")
        at = next(i for i, line in enumerate(lines) if "cleanPodPolicy" in line)
        lines.insert(at, f"    activeDeadlineSeconds: {job.seconds}")
        return "\n".join(line for line in lines if not line.startswith("#")) + "\n"

    def submit(self, folder: Path) -> str:
        """Submit, and return the name of the MPIJob."""
        printed = base.ask([self.program, "create", "-f", self.script, "-o", "name"], cwd=folder)
        return base.job_id(r"^mpijob\.kubeflow\.org/(\S+)", printed)

    def state(self, job_id: str) -> State:
        """Ask for the newest condition that holds."""
        try:
            told = base.ask([self.program, "get", "mpijob", job_id, "-o", "json"])
        except SchedulerFailed as error:
            if "NotFound" in str(error):
                return State("unknown", "unknown", "it is deleted")
            raise
        conditions = json.loads(told).get("status", {}).get("conditions", [])
        holds = [c for c in conditions if c.get("status") == "True"]
        if not holds:
            return State("queued", "new")
        word = str(holds[-1].get("type"))
        return State(STATES.get(word, "unknown"), word, str(holds[-1].get("reason", "")))
