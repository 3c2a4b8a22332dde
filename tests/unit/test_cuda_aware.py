"""Whether MPI takes GPU memory: what a child finds out, however it ends, and what is kept of it."""

from __future__ import annotations

import json
import os
import stat
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidl import cuda_aware, cuda_probe, mpi
from mpidl.errors import InvalidArgument, MPINotFound
from tests.unit.devices import installed

# fmt: off
CHILDREN = {
    "print('mpidl: yes')": "yes (a trial sent from GPU memory)",
    "print('noise\\nmpidl: a sum of 4096 float32 in GPU memory came out wrong')":
        "no (a sum of 4096 float32 in GPU memory came out wrong)",
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "no (a trial died of SIGSEGV)",
    "print('mpidl: yes', flush=True); import os; os.abort()": "no (a trial died of SIGABRT)",
    "import time; time.sleep(60)": "no (no answer: a trial did not end within 1 s)",
    "import sys; sys.exit('a\\nno such symbol')":
        "no (a trial failed with status 1: no such symbol)",
    "": "no (a trial failed with status 0: )",
    "print('mpidl: no GPU: none is visible')": "no (no GPU: none is visible)",
}
# fmt: on


def child(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the answer depends on here; the cache is in a folder that does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MPIDL_CUDA_AWARE", raising=False)
    made = {"library": "MPI 1", "path": "/lib/libmpi.so", "driver": "550", "host": "a"}
    monkeypatch.setattr(cuda_aware, "key", lambda: dict(made))
    return made


@pytest.mark.parametrize("code", CHILDREN)
def test_a_child_may_end_in_any_way(code: str) -> None:
    seconds = 1.0 if "sleep" in code else 30.0
    assert str(cuda_aware.measure(child(code), seconds)) == CHILDREN[code]


def test_a_child_that_cannot_start() -> None:
    assert "no (no MPI: a trial could not start" in str(cuda_aware.measure(["/no/such/file"]))


def test_a_child_is_no_rank_of_this_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMIX_NAMESPACE"):
        monkeypatch.setenv(name, "2")
    code = "import os; print('mpidl:', *sorted(k for k in os.environ if k[:3] in ('OMP', 'PMI')))"
    monkeypatch.setenv("OMPI_MCA_pml", "ob1")
    assert "OMPI_MCA_pml" in str(cuda_aware.measure(child(code)))
    assert "PMI" not in str(cuda_aware.measure(child(code))).replace("OMPI", "")


@pytest.mark.parametrize("launched", ["", "SLURM_STEP_NUM_TASKS", "FLUX_JOB_SIZE"])
def test_the_real_child_finds_no_gpu_here(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a launcher has started many of this process: it is none of them."""
    if "cupy" in sys.modules:
        pytest.skip("there is a GPU's library")
    if launched:
        monkeypatch.setenv(launched, "8")
    assert str(cuda_aware.measure()).startswith("no (no GPU: ")


def test_an_answer_is_kept_for_this_user_alone(facts: dict[str, Any], tmp_path: Path) -> None:
    yes, no = child("print('mpidl: yes')"), child("print('mpidl: another')")
    assert cuda_aware.answer(yes).yes
    assert cuda_aware.answer(no).yes  # as was found before
    folder = tmp_path / "cache" / "mpidl"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (kept,) = folder.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert json.loads(kept.read_text())["of"] == facts


@pytest.mark.parametrize("name", ["library", "path", "driver", "host", "settings"])
def test_another_place_is_asked_anew(name: str, facts: dict[str, Any]) -> None:
    assert cuda_aware.answer(child("print('mpidl: yes')")).yes
    facts[name] = {"UCX_TLS": "tcp"} if name == "settings" else "another"
    assert not cuda_aware.answer(child("print('mpidl: wrong values')")).yes


@pytest.mark.parametrize("text", ["", "{", "[]", '{"of": 1}', '{"of": OF, "answer": {"yes": 1}}',
                                  '{"of": OF, "answer": {"yes": "no", "why": "x"}}'])  # fmt: skip
def test_what_is_damaged_is_asked_anew(text: str, facts: dict[str, Any], tmp_path: Path) -> None:
    cuda_aware.answer(child("print('mpidl: wrong values')"))
    (kept,) = (tmp_path / "cache" / "mpidl").iterdir()
    kept.write_text(text.replace("OF", json.dumps(facts)))
    assert cuda_aware.answer(child("print('mpidl: yes')")).yes


def test_what_may_change_tomorrow_is_not_kept(facts: dict[str, Any]) -> None:
    for reason in ("no GPU: none is visible", "no MPI: not found"):
        assert cuda_aware.answer(child(f"print('mpidl: {reason}')")).why == reason
    assert cuda_aware.answer(child("print('mpidl: yes')")).yes


def test_without_a_place_for_it_it_is_measured_again(
    facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, where a folder should be")
    assert cuda_aware.answer(child("print('mpidl: yes')")).yes
    assert not cuda_aware.answer(child("print('mpidl: wrong')")).yes
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cuda_aware.answer(child("print('mpidl: yes')")).yes


@pytest.mark.parametrize("value", ["yes", "no"])
def test_the_user_overrules_all(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_CUDA_AWARE", value)
    monkeypatch.setattr(mpi, "load", lambda: pytest.fail("the library was asked"))
    assert str(cuda_aware.answer(["/no/child"])) == f"{value} (MPIDL_CUDA_AWARE={value})"


def test_a_wrong_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_CUDA_AWARE", "maybe")
    with pytest.raises(InvalidArgument, match="expected one of auto, yes, no"):
        cuda_aware.answer()


class Comm:
    """Does with device arrays what a CUDA-aware MPI does, or something else."""

    def __init__(self, **wrong: Any) -> None:
        self.wrong = wrong

    def Sendrecv(self, sent: Any, _: int, __: int, came: Any, ___: int, ____: int) -> None:
        came.host[...] = sent.host + self.wrong.get("message", 0)

    def Allreduce(self, sent: Any, total: Any) -> None:
        if "error" in self.wrong:
            raise self.wrong["error"]
        if sent is not None:
            total.host[...] = sent.host + self.wrong.get("sum", 0)
        else:
            total.host[-1:] += self.wrong.get("place", 0)


TRIALS: dict[str, dict[str, Any]] = {
    "yes": {},
    "a message of 1 float32 in GPU memory came out wrong": {"message": 1},
    "a sum of 1 float32 in GPU memory came out wrong": {"sum": 1},
    "a sum in place of 1 float32 in GPU memory came out wrong": {"place": 1},
    "MPI refuses GPU memory: no such buffer": {"error": BufferError("no such buffer")},
}


@pytest.mark.parametrize("verdict", TRIALS)
def test_the_trial_looks_at_values(verdict: str) -> None:
    with installed() as cupy:
        MPI = types.SimpleNamespace(
            COMM_SELF=Comm(**TRIALS[verdict]), IN_PLACE=None, Exception=np.exceptions.AxisError
        )
        assert cuda_probe.trial(MPI, cupy) == verdict


def test_a_trial_without_gpu_or_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed() as cupy:
        cupy.cuda.runtime.getDeviceCount = lambda: 0
        assert cuda_probe.verdict() == "no GPU: none is visible"
        cupy.cuda.runtime.getDeviceCount = lambda: 1

        def load() -> Any:
            raise MPINotFound("no MPI library found")

        monkeypatch.setattr(mpi, "load", load)
        assert cuda_probe.verdict() == "no MPI: no MPI library found"


def test_what_the_answer_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = types.SimpleNamespace(Get_library_version=lambda: "MPI 2")
    monkeypatch.setattr(mpi, "load", lambda: library)
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(cuda_aware, "DRIVER", tmp_path / "version")
    assert cuda_aware.key()["driver"] is None
    (tmp_path / "version").write_text("NVRM version: 580")
    key = cuda_aware.key()
    assert (key["library"], key["driver"]) == ("MPI 2", "NVRM version: 580")
    assert key["settings"]["UCX_TLS"] == "tcp" and key["host"]
