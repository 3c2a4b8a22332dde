"""Environment variables."""

from __future__ import annotations

import os

import pytest

from mpidl import config, launched
from mpidl.errors import InvalidArgument

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SIZES, "SLURM_NTASKS", "MPIDL_CUDA_AWARE", "MPIDL_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.startswith(("PMI", "OMPI_COMM_", "SLURM_", "FLUX_", "JSM_", "PALS_", "ALPS_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("value", ["auto", "yes", "no"])
def test_cuda_aware_takes(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_CUDA_AWARE", value)
    assert config.cuda_aware() == value


def test_cuda_aware_is_asked_of_the_library_by_default() -> None:
    assert config.cuda_aware() == "auto"


@pytest.mark.parametrize("value", ["1", "", "YES"])
def test_an_unknown_setting_lists_the_known_ones(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIDL_CUDA_AWARE", value)
    message = f"MPIDL_CUDA_AWARE='{value}': expected one of auto, yes, no"
    with pytest.raises(InvalidArgument, match=message):
        config.cuda_aware()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ("OMPI_COMM_WORLD_SIZE", 4)),
        ({"PMI_SIZE": "3"}, ("PMI_SIZE", 3)),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ("SLURM_STEP_NUM_TASKS", 2)),
        # mpirun inside a SLURM step: mpirun started the ranks
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1"}, ("OMPI_COMM_WORLD_SIZE", 4)),
        ({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1"}, ("PMI_SIZE", 4)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "PMI_SIZE": "2"}, ("OMPI_COMM_WORLD_SIZE", 4)),
        ({"SLURM_NTASKS": "8"}, None),  # of the job: set in a batch script, where one process runs
        ({"OMPI_COMM_WORLD_SIZE": "many", "PMI_SIZE": "2"}, ("PMI_SIZE", 2)),
        ({"PMI_SIZE": ""}, None),
        # a batch script, a shell that salloc keeps, and another step
        ({"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "2"}, None),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "2"}, None),
        (
            {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2"},
            ("SLURM_STEP_NUM_TASKS", 2),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}, None),
        ({"JSM_NAMESPACE_SIZE": "4", "LSB_JOBID": "7"}, ("JSM_NAMESPACE_SIZE", 4)),
        ({"FLUX_JOB_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, ("FLUX_JOB_SIZE", 4)),
        ({"PALS_LOCAL_SIZE": "2", "PALS_RANKID": "0"}, ("PALS_LOCAL_SIZE", 2)),
        ({"ALPS_APP_PE": "3"}, ("ALPS_APP_PE", 4)),
        ({"ALPS_APP_PE": "0"}, None),
        ({"PMIX_RANK": "1"}, ("PMIX_RANK", 2)),
        ({"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "4"}, ("SLURM_STEP_NUM_TASKS", 4)),
        ({"FLUX_URI": "local:///run/flux/local", "PBS_JOBID": "1", "LSB_JOBID": "7"}, None),
    ],
)
def test_the_size_a_launcher_tells(
    environment: dict[str, str],
    expected: tuple[str, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched.size() == expected


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"SLURM_PROCID": "2"}, 2),
        ({"SLURM_PROCID": "2", "PMIX_RANK": "3"}, 3),
        ({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "3"}, 3),
        ({"FLUX_TASK_RANK": "4"}, 4),
        ({"JSM_NAMESPACE_RANK": "5"}, 5),
        ({"PALS_RANKID": "6"}, 6),
        ({"ALPS_APP_PE": "7"}, 7),
        ({"PMI_RANK": "x", "SLURM_PROCID": "1"}, 1),
    ],
)
def test_the_rank_a_launcher_tells(
    environment: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched.rank() == rank


@pytest.mark.parametrize(("value", "width"), [("132", 132), ("", None), ("wide", None)])
def test_the_width_of_the_terminal(
    value: str, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.terminal_width() is None
    monkeypatch.setenv("MPIDL_TERMINAL", value)
    assert config.terminal_width() == width


@pytest.mark.parametrize("name", ["PMIX_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", None])
def test_launched(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if name:
        monkeypatch.setenv(name, "0")
    assert launched.found() is (name is not None)


def test_a_setting_is_for_its_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPIDL_TEST_SETTING", raising=False)
    with config.setting("MPIDL_TEST_SETTING", "a"):
        assert os.environ["MPIDL_TEST_SETTING"] == "a"
    assert "MPIDL_TEST_SETTING" not in os.environ
    monkeypatch.setenv("MPIDL_TEST_SETTING", "the user's")
    with config.setting("MPIDL_TEST_SETTING", "a"):
        assert os.environ["MPIDL_TEST_SETTING"] == "the user's"
    assert os.environ["MPIDL_TEST_SETTING"] == "the user's"


@pytest.mark.parametrize(("value", "folder"), [("/runs/a", "/runs/a"), ("", None), (None, None)])
def test_the_folder_of_a_job(
    value: str | None, folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPIDL_OUT", raising=False)
    if value is not None:
        monkeypatch.setenv("MPIDL_OUT", value)
    assert config.out() == folder


@pytest.mark.parametrize(
    ("environment", "user", "allocated"),
    [
        ({"OMP_NUM_THREADS": "8"}, 8, None),
        ({"OMP_NUM_THREADS": "8", "NCPUS": "8"}, 8, None),  # not in a job of PBS
        ({"PBS_JOBID": "1", "OMP_NUM_THREADS": "8", "NCPUS": "8"}, None, 8),
        ({"PBS_JOBID": "1", "OMP_NUM_THREADS": "2", "NCPUS": "8"}, 2, None),
        ({"PBS_JOBID": "1", "NCPUS": "8"}, None, None),
        (
            {"PBS_JOBID": "1", "OMP_NUM_THREADS": "8", "NCPUS": "8", "MKL_NUM_THREADS": "3"},
            3,
            8,
        ),
        ({"SLURM_CPUS_PER_TASK": "4"}, None, 4),
    ],
)
def test_threads_that_pbs_has_set_are_not_the_user_s(
    environment: dict[str, str],
    user: int | None,
    allocated: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    for name in (*of_threads, "NCPUS", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (config.threads(), config.allocated_cores()) == (user, allocated)
