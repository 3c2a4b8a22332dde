"""`mpidl run --replace` on two hosts: a new rank comes to the host of the one that was killed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from tests import job
from tests.conftest import SEED
from tests.hosts.conftest import SCRIPT
from tests.jobs.test_replace import TRAIN

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hosts.conftest import Hosts, Up

SLOW = TRAIN.replace("sleep(0.04)", "sleep(0.2)")  # processes start more slowly there
WHERE = f"""{SLOW}
import socket
print(f"HOST {{rank}} {{socket.gethostname()}} {{spawned}}", flush=True)
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    script = job.script(tmp_path_factory.mktemp("alone"), TRAIN)
    result = job.execute("openmpi", sys.executable, script, str(SEED), "")
    assert result.status == 0, result
    found: list[object] = json.loads(result.output.rsplit(" ", 3)[0])
    return found


def train(hosts: Hosts, folder: Path, *kills: str) -> tuple[job.Result, dict[str, list[str]]]:
    """Train with 2 ranks on each host. Returns where each rank was at the end."""
    script = job.script(folder, WHERE)
    line = [SCRIPT, "run", "t0", sys.executable, "-m", "mpidl", "run", "--elastic", "--replace"]
    line += ["--hosts", "t0:2,t1:2", script, str(SEED), str(folder), *kills]
    settings = {"HOSTS_DIR": str(hosts.folder), "OPENBLAS_NUM_THREADS": "1"}
    process = job.start("openmpi", *line, cwd=folder, **settings)
    result = hosts.finish(process, 60)
    assert result.status == 0, result
    told = [text.split()[1:] for text in result.output.splitlines() if text.startswith("HOST ")]
    return result, {rank: rest for rank, *rest in told}


@pytest.mark.soak  # processes start slowly there
def test_a_rank_is_replaced_on_its_host(expected: list[object], hosts: Up, tmp_path: Path) -> None:
    result, where = train(hosts(2), tmp_path, "old:1:5", "old:3:12")
    assert where == {
        "0": ["t0", "False"],
        "1": ["t0", "True"],
        "2": ["t1", "False"],
        "3": ["t1", "True"],
    }, result
    lines = [line for line in result.output.splitlines() if not line.startswith("HOST ")]
    assert [json.loads(line.rsplit(" ", 3)[0]) for line in lines] == [expected] * 4, result
    assert {line.rsplit(" ", 3)[1] for line in lines} == {"4"}, result
