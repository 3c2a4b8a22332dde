"""The loader: the same batches from any number of workers, errors told, nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidl import mpi
from mpidl.data import ArrayDataset, Loader, batches
from mpidl.data.workers.parcel import pack
from mpidl.data.workers.slot import Slot, memory_file
from mpidl.data.workers.worker import Task, prepare
from mpidl.errors import BatchTooLarge, DeviceNotFound, InvalidArgument, MpidlError, WorkerFailed
from tests.jobs.test_interrupt import running
from tests.transforms import (
    Broken,
    Closed,
    Counted,
    Opened,
    always,
    fail,
    growing,
    import_mpi,
    interrupt_once,
    kill_once,
    leave,
    lengthy,
    noisy,
    numbers,
    start_mpi,
    tell,
)

WORKERS = [0, 1, 2, 3]
PATIENCE = 20.0  # seconds until something that must come about is missed


@pytest.fixture
def make() -> Iterator[Callable[..., Loader]]:
    """Makes loaders, and closes them."""
    made = []

    def loader(dataset: Any, batch_size: int, **options: Any) -> Loader:
        made.append(Loader(dataset, batch_size, **{"world": None, **options}))
        return made[-1]

    yield loader
    for one in made:
        one.close()


def assert_same(got: Any, wanted: Any) -> None:
    got, wanted = list(got), list(wanted)
    assert len(got) == len(wanted) > 0
    for pair, other in zip(got, wanted, strict=True):
        for array, reference in zip(pair, other, strict=True):
            assert array.dtype == reference.dtype
            assert array.flags.c_contiguous and array.flags.writeable
            np.testing.assert_array_equal(array, reference)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def open_files() -> list[str]:
    """Return what this process has open, without the descriptor that finds it out."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{file.name} {file.readlink()}")
    return sorted(found)


def pids(loader: Loader) -> list[int]:
    return [worker.process.pid for worker in loader._running]


# What it yields


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("prefetch", [1, 3])
def test_without_a_transform_it_yields_what_batches_does(
    workers: int, prefetch: int, rng: np.random.Generator, make: Callable[..., Loader]
) -> None:
    n = int(rng.integers(1, 40))
    options = {"seed": int(rng.integers(99)), "shuffle": bool(rng.integers(2))}
    loader = make(numbers(n), int(rng.integers(1, n + 1)), workers=workers, prefetch=prefetch,
                  **options)  # fmt: skip
    for epoch in (0, int(rng.integers(1, 99)), 0):
        wanted = batches(numbers(n), loader.batch_size, world=None, epoch=epoch, **options)
        assert len(loader) == len(loader.epoch(epoch)) == len(wanted)
        assert_same(loader.epoch(epoch), wanted)


@pytest.mark.parametrize("workers", WORKERS)
def test_random_numbers_depend_on_seed_epoch_and_step_alone(
    workers: int, rng: np.random.Generator, make: Callable[..., Loader]
) -> None:
    seed, epoch = (int(i) for i in rng.integers(99, size=2))
    wanted = []
    for step, (x, y) in enumerate(batches(numbers(20), 6, world=None, seed=seed, epoch=epoch)):
        sequence = np.random.SeedSequence([seed, epoch], spawn_key=(step, 0))
        wanted.append(noisy(x, y, np.random.default_rng(sequence)))
    loader = make(numbers(20), 6, workers=workers, transform=noisy, seed=seed)
    assert_same(loader.epoch(epoch), wanted)


def test_random_numbers_are_not_those_of_the_shuffle() -> None:
    """[seed, epoch] and [seed, epoch, 0, 0] are the same seed."""
    drawn: list[int] = []

    def draw(x: Any, y: Any, rng: np.random.Generator) -> Any:
        drawn.append(int(rng.integers(2**62)))
        return x, y

    loader = Loader(numbers(6), 2, world=None, workers=0, transform=draw)
    places = [(epoch, *pair) for epoch in range(2) for pair in ((0, 0), (0, 1), (1, 0))]
    for epoch, step, start in places:
        prepare(numbers(6), draw, Task(0, 0, epoch, step, 0, 0, start, np.arange(2)))
    shuffles = [np.random.default_rng([0, epoch]).integers(2**62) for epoch in range(2)]
    assert len({*drawn, *map(int, shuffles)}) == len(places) + 2
    before = drawn.copy()
    list(loader.epoch(0))
    assert drawn[len(before)] == before[0]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_shapes_and_dtypes_may_change_and_slots_grow(
    workers: int, rng: np.random.Generator, make: Callable[..., Loader]
) -> None:
    options = {"transform": growing, "seed": int(rng.integers(2**40))}
    alone = make(numbers(90), 5, workers=0, **options)
    loader = make(numbers(90), 5, workers=workers, prefetch=2, **options)
    assert_same(loader.epoch(0), alone.epoch(0))
    assert_same(loader.epoch(1), alone.epoch(1))


def test_arrays_are_the_callers_own(make: Callable[..., Loader]) -> None:
    loader = make(numbers(40), 4, workers=2, prefetch=1)
    kept = list(loader.epoch(0))
    for x, y in loader.epoch(0):
        x[:], y[:] = -1, -1
    assert_same(kept, batches(numbers(40), 4, world=None))


def test_iterating_goes_on_to_the_next_epoch(make: Callable[..., Loader]) -> None:
    loader = make(numbers(10), 4, workers=1, seed=5)
    for epoch in range(3):
        wanted = batches(numbers(10), 4, world=None, seed=5, epoch=epoch)
        assert_same(loader, wanted)
    assert_same(loader.epoch(0), batches(numbers(10), 4, world=None, seed=5))
    assert_same(loader, batches(numbers(10), 4, world=None, seed=5, epoch=3))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iteration_may_be_given_up(workers: int, make: Callable[..., Loader]) -> None:
    loader = make(numbers(60), 4, workers=workers, prefetch=3, transform=noisy)
    first = iter(loader.epoch(0))
    next(first)
    assert_same(loader.epoch(1), make(numbers(60), 4, workers=0, transform=noisy).epoch(1))
    with pytest.raises(InvalidArgument, match="another iteration has begun"):
        next(first)
    assert_same(loader.epoch(0), make(numbers(60), 4, workers=0, transform=noisy).epoch(0))


def test_a_worker_is_no_further_ahead_than_asked(
    tmp_path: Path, make: Callable[..., Loader]
) -> None:
    loader = make(Counted(tmp_path, 100), 1, workers=2, prefetch=3)
    begun = iter(loader.epoch(0))
    for done in (1, 2):
        next(begun)
        wait_for(lambda n=done: len(list(tmp_path.iterdir())) >= n + 6, "batches are not prepared")
        time.sleep(0.1)
        assert len(list(tmp_path.iterdir())) == done + 6


def test_an_empty_shard_is_not_transformed(rng: np.random.Generator) -> None:
    def never(x: Any, y: Any, rng: Any) -> Any:
        raise AssertionError

    x, y = prepare(numbers(3), never, Task(0, 0, 0, 0, 0, 0, 0, np.arange(0)))
    assert (x.shape, y.shape) == ((0, 3), (0,))


# What is wrong


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": -1}, InvalidArgument, "workers=-1: expected a whole number from 0 on"),
        ({"prefetch": 0}, InvalidArgument, "prefetch=0: expected a whole number from 1 on"),
        ({"prefetch": 0, "workers": 0}, InvalidArgument, "prefetch=0"),
        ({"batch_size": 11}, BatchTooLarge, "batch_size=11 is larger than"),
        ({"seed": -1}, InvalidArgument, "seed=-1"),
        ({"device": "tpu"}, InvalidArgument, "device 'tpu'"),
    ],
)
def test_values_that_cannot_be(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Loader(**{"dataset": numbers(10), "batch_size": 5, "world": None, **options})


def test_batches_for_a_gpu_need_one(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., Loader]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceNotFound, match="needs CuPy"):
        make(numbers(10), 5, device="cuda")
    with pytest.raises(DeviceNotFound, match="needs CuPy"):
        make(numbers(10), 5, workers=0).epoch(0, device="cuda")


def test_what_cannot_be_sent_is_named(make: Callable[..., Loader], tmp_path: Path) -> None:
    def local(x: Any, y: Any, rng: Any) -> Any:
        return x, y

    for transform in (lambda x, y, _: (x, y), local):
        with pytest.raises(InvalidArgument, match=r"the transform cannot be sent .*workers=0"):
            make(numbers(10), 5, workers=1, transform=transform)
        assert_same(make(numbers(10), 5, workers=0, transform=transform),
                    batches(numbers(10), 5, world=None))  # fmt: skip
    with (tmp_path / "open").open("w") as file:
        data = numbers(10)
        vars(data)["file"] = file
        with pytest.raises(InvalidArgument, match=r"the dataset cannot be sent .*TextIOWrapper"):
            make(data, 5, workers=1)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_arrives_as_it_was_raised(workers: int, make: Callable[..., Loader]) -> None:
    transform = functools.partial(fail, kind=Broken, at=8)
    loader = make(numbers(40), 4, workers=workers, transform=transform, shuffle=False)
    seen: list[list[int]] = []
    for epoch in (0, 7):  # the loader goes on
        seen.clear()
        with pytest.raises(Broken, match=r"^a broken leaf$") as caught:
            seen.extend(y.tolist() for _, y in loader.epoch(epoch))
        assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    if workers:
        cause = caught.value.__cause__
        assert isinstance(cause, WorkerFailed)
        assert str(cause).startswith(
            f"worker {2 % workers} of the loader failed in epoch 7, batch 2:\n\nTraceback"
        )
        assert "in fail\n" in str(cause) and "raise kind(" in str(cause)


@pytest.mark.parametrize("transform", [functools.partial(fail, kind=Closed, at=8), leave])
def test_an_error_that_cannot_travel_is_told(transform: Any, make: Callable[..., Loader]) -> None:
    loader = make(numbers(40), 4, workers=2, transform=transform, shuffle=False)
    with pytest.raises(WorkerFailed, match=r"worker . of the loader failed in epoch 0") as caught:
        list(loader.epoch(0))
    assert type(caught.value) is WorkerFailed
    assert ("SystemExit: 0" if transform is leave else "Closed: a broken leaf") in str(caught.value)


def test_an_error_of_any_length(make: Callable[..., Loader]) -> None:
    """No reply may fill the socket while the rank is sending."""
    transform = functools.partial(fail, kind=lengthy, at=8)
    loader = make(numbers(40), 4, workers=1, transform=transform, shuffle=False)
    with pytest.raises(WorkerFailed, match="failed in epoch 0, batch 2") as caught:
        list(loader.epoch(0))
    assert 1000 < len(str(caught.value)) < 100_000


def test_a_data_set_that_cannot_be_opened_again(make: Callable[..., Loader]) -> None:
    loader = make(Opened(numbers(9).x, numbers(9).y), 4, workers=2)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="a lost leaf") as caught:
            list(loader.epoch(0))
        assert "failed while it was set up" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, r"was ended by signal 9 \(SIGKILL\); .* memory is short"),
        (signal.SIGSEGV, r"was ended by signal 11 \(SIGSEGV\)$"),
        (-3, "ended with exit status 3$"),
    ],
)
def test_a_worker_that_ends_is_named(
    how: int, message: str, tmp_path: Path, make: Callable[..., Loader]
) -> None:
    transform = functools.partial(kill_once, mark=tmp_path / "mark", how=how)
    loader = make(numbers(40), 4, workers=2, transform=transform, shuffle=False)
    name = r"^worker 0 of the loader \(process (\d+)\), asked for epoch 0, batch 2, "
    with pytest.raises(WorkerFailed, match=name + message):
        list(loader.epoch(0))
    assert_same(loader.epoch(0), batches(numbers(40), 4, world=None, shuffle=False))


def test_a_worker_killed_between_epochs_is_replaced(make: Callable[..., Loader]) -> None:
    loader = make(numbers(40), 4, workers=2)
    list(loader)
    os.kill(pids(loader)[1], signal.SIGKILL)
    wait_for(lambda: not loader._running[1].alive(), "it was not killed")
    assert_same(loader, batches(numbers(40), 4, world=None, epoch=1))


def test_a_loader_that_was_interrupted_goes_on(tmp_path: Path, make: Callable[..., Loader]) -> None:
    transform = functools.partial(interrupt_once, mark=tmp_path / "mark")
    loader = make(numbers(40), 4, workers=2, transform=transform, shuffle=False)
    with pytest.raises(KeyboardInterrupt):
        list(loader.epoch(0))
    assert_same(loader.epoch(0), batches(numbers(40), 4, world=None, shuffle=False))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "the transform returned NoneType, not (x, y)"),
        ([1, 2], "the transform returned list, not (x, y)"),
        ((np.zeros((2, 3)), np.zeros(4)), "the transform returned x (2, 3) of float64; expected"),
        ((np.zeros(4), 5), "the transform returned y (1,) of int64; expected (4, ...)"),
        ((np.zeros(4), np.array([None] * 4)), "the transform returned y (4,) of object"),
    ],
    ids=["none", "list", "fewer", "number", "objects"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_transform_may_not_return(
    made: Any, message: str, workers: int, make: Callable[..., Loader]
) -> None:
    loader = make(numbers(8), 4, workers=workers, transform=functools.partial(always, made))
    with pytest.raises(InvalidArgument) as caught:
        list(loader)
    assert message in str(caught.value)


# What workers are


def facts_of_a_worker(make: Callable[..., Loader], path: Path) -> dict[str, Any]:
    """Return what `tell` wrote about the second batch: then it has a slot in use."""
    transform = functools.partial(tell, path=path)
    list(make(numbers(8), 4, workers=1, prefetch=1, transform=transform))
    return json.loads(path.read_text())


def test_a_worker_is_no_rank(
    tmp_path: Path, make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"]
    for name in ranks:
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    facts = facts_of_a_worker(make, tmp_path / "facts")
    assert not [name for name in facts["modules"] if name.startswith("mpi4py")]
    environment = facts["environment"]
    assert not set(ranks) & set(environment)
    assert environment["SLURM_JOB_ID"] == "7"
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    assert [environment[name] for name in threads] == ["1"] * 3
    assert "/dev/shm" not in facts["maps"]
    assert "memfd:mpidl-slot" in facts["maps"]


def test_a_worker_leaves_the_ranks_input_alone(tmp_path: Path, make: Callable[..., Loader]) -> None:
    ours, (reads, writes) = os.dup(0), os.pipe()
    os.dup2(reads, 0)
    try:
        assert facts_of_a_worker(make, tmp_path / "facts")["stdin"] == "/dev/null"
    finally:
        os.dup2(ours, 0)
        for file in (ours, reads, writes):
            os.close(file)


def test_signals_to_the_job_are_the_ranks_own(
    tmp_path: Path, make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = facts_of_a_worker(make, tmp_path / "facts")
    for number in ("INT", "TERM", "HUP", "USR1", "USR2"):
        assert facts["ignored"] >> (signal.Signals["SIG" + number] - 1) & 1, number
    assert facts["blocked"] == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_starts_no_mpi(make: Callable[..., Loader]) -> None:
    load = mpi.load
    loader = make(numbers(4), 4, workers=1, transform=start_mpi)
    with pytest.raises(MpidlError, match="is no rank and starts no MPI"):
        list(loader)
    assert mpi.load is load


def test_a_worker_may_import_mpi4py(make: Callable[..., Loader]) -> None:
    assert_same(make(numbers(8), 4, workers=1, transform=import_mpi),
                batches(numbers(8), 4, world=None))  # fmt: skip


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    before = open_files()
    with Loader(numbers(40), 4, world=None, workers=2) as loader:
        next(iter(loader))
        workers = pids(loader)
        assert all(map(running, workers))
        kept = iter(loader.epoch(1))
        next(kept)
    assert not any(map(running, workers))
    assert open_files() == before
    for begin in (lambda: next(kept), lambda: list(loader), lambda: list(loader.epoch(0))):
        with pytest.raises(InvalidArgument, match="it is closed"):
            begin()
    loader.close()


def test_a_lost_loader_leaves_nothing() -> None:
    before = open_files()
    loader = Loader(numbers(40), 4, world=None, workers=1)
    list(loader)
    workers = pids(loader)
    del loader
    gc.collect()
    assert not any(map(running, workers))
    assert open_files() == before


@pytest.mark.filterwarnings("ignore:os.fork")  # of JAX, where another test has imported it
def test_a_forked_copy_of_the_rank_leaves_the_workers_alone(make: Callable[..., Loader]) -> None:
    loader = make(numbers(40), 4, workers=2)
    list(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: this child does little
        child = os.fork()
    if child == 0:
        try:
            loader.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert all(map(running, pids(loader)))
    assert_same(loader, batches(numbers(40), 4, world=None, epoch=1))


# What they are sent


def unpack(**objects: Any) -> tuple[Any, int]:
    """Return the objects as a worker gets them, and the bytes of shared memory it took."""
    parcel = pack(**objects)
    size = os.fstat(parcel.file).st_size
    made = parcel.open(parcel.file)
    os.close(parcel.file)
    return made, size


def test_arrays_are_shared_and_writing_to_them_is_not(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(100, 7)), rng.integers(0, 9, 100).astype(np.int8)
    parcel = pack(dataset=ArrayDataset(x, y), other={"x": x, "none": np.zeros((0, 3))})
    size = os.fstat(parcel.file).st_size
    assert x.nbytes + y.nbytes <= size < x.nbytes + y.nbytes + 200  # x went but once
    assert len(parcel.item.stream) < 1000
    (one, other), (again, _) = (parcel.open(parcel.file) for _ in range(2))
    np.testing.assert_array_equal(one.x, x)
    np.testing.assert_array_equal(one.y, y)
    assert other["x"] is one.x
    assert other["none"].shape == (0, 3)
    one.x[:] = 0
    np.testing.assert_array_equal(again.x, x)
    os.close(parcel.file)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_mapped_files_are_mapped_again(
    order: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    x = rng.normal(size=(300, 40)).astype(np.float32, order=order)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    raw = np.memmap(tmp_path / "x.npy", "u1", "r", offset=5000)
    cut = slice(100, 290)
    parts = (mapped, mapped[cut], mapped.T[5:30], np.asarray(mapped)[cut][10:], raw, raw[7:][1:])
    whole = [part for part in parts if part.flags.forc]
    assert len(whole) >= 4
    (made,), size = unpack(dataset=whole)
    assert size == 0
    for part, copy in zip(whole, made, strict=True):
        assert isinstance(copy, np.memmap)
        np.testing.assert_array_equal(part, copy)


def test_a_large_file_streams(
    tmp_path: Path, rng: np.random.Generator, make: Callable[..., Loader]
) -> None:
    """1 GiB, of which only the samples that are taken are ever in memory, or even on disk."""
    n = 1 << 18
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(n, 1024))
    loader = make(ArrayDataset(x, np.arange(n)), 16, workers=2)
    shards = [shard.samples for shard in islice(loader.epoch(0).shards(), 5)]
    for indices in shards:
        x[indices] = rng.normal(size=(16, 1024))
    assert os.fstat(loader._parcel.file).st_size == 8 * n  # the targets
    assert_same(islice(loader, 5), [(np.array(x[indices]), indices) for indices in shards])


def test_maps_that_are_no_part_of_a_file_go_as_they_are(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    np.save(tmp_path / "x.npy", rng.normal(size=(30, 40)))
    strided = np.load(tmp_path / "x.npy", mmap_mode="r")[::2, ::3]
    written = np.load(tmp_path / "x.npy", mmap_mode="c")
    written[3] = 7
    np.save(tmp_path / "lost.npy", rng.normal(size=(30, 40)))
    lost = np.load(tmp_path / "lost.npy", mmap_mode="r")
    (tmp_path / "lost.npy").unlink()
    parts = [strided, written, written[::2, ::3], lost, lost + 1, lost[[3, 1]], lost[:0]]
    (made,), _ = unpack(dataset=parts)
    for part, copy in zip(parts, made, strict=True):
        np.testing.assert_array_equal(part, copy)


def test_a_slot_holds_what_was_written_last(rng: np.random.Generator) -> None:
    file = memory_file("mpidl-test")
    here, there = Slot(file), Slot(os.dup(file))
    for _ in range(20):
        shapes = [tuple(rng.integers(0, 60, rng.integers(0, 4))) for _ in range(2)]
        arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        for array, copy in zip(arrays, there.read(here.write(arrays)), strict=True):
            np.testing.assert_array_equal(array, copy)
            assert copy.ctypes.data % 64 == 0 or copy.size == 0
    here.close()
    there.close()
