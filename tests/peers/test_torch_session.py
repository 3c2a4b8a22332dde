"""init, what there is to ask, process sets, objects, timelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpidl import abort
from mpidl.errors import InvalidArgument, RankMismatch
from tests.ranks.conftest import PLACEMENTS, as_nodes

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("mpidl.torch")
sessions = pytest.importorskip("mpidl.torch.session")

if TYPE_CHECKING:
    import mpidl

hvd.init()


@pytest.fixture
def initialized(world: mpidl.World) -> None:
    """Begin anew, and again afterwards. Collective."""
    hvd.shutdown()
    yield
    hvd.shutdown()
    hvd.init()


def test_before_init(initialized: None) -> None:
    assert not hvd.is_initialized()
    hvd.shutdown()  # does nothing
    x = torch.ones(2)
    for ask in (
        hvd.rank,
        hvd.size,
        hvd.local_rank,
        hvd.local_size,
        hvd.cross_rank,
        hvd.cross_size,
        hvd.is_homogeneous,
        hvd.mpi_threads_supported,
        hvd.join,
        hvd.barrier,
        hvd.stop_timeline,
        lambda: hvd.allreduce(x),
        lambda: hvd.allreduce_async_(x),
        lambda: hvd.grouped_allreduce([x]),
        lambda: hvd.broadcast_(x, 0),
        lambda: hvd.synchronize(1),
        lambda: hvd.broadcast_object(1),
        lambda: hvd.add_process_set([0]),
    ):
        with pytest.raises(ValueError, match=r"call mpidl\.torch\.init"):
            ask()
    assert hvd.global_process_set.included() is None


def test_what_the_ranks_are(world: mpidl.World) -> None:
    hvd.init()  # once more
    assert hvd.is_initialized()
    assert (hvd.rank(), hvd.size()) == (world.rank, world.size)
    assert (hvd.local_rank(), hvd.local_size()) == (world.local_rank, world.local_size)
    assert (hvd.cross_rank(), hvd.cross_size()) == (world.node, world.nodes)
    assert hvd.is_homogeneous() and hvd.mpi_enabled() and hvd.mpi_built()
    assert hvd.mpi_threads_supported() == world.threads
    assert not any(
        (
            hvd.gloo_enabled(),
            hvd.gloo_built(),
            hvd.nccl_built(),
            hvd.ddl_built(),
            hvd.ccl_built(),
            hvd.cuda_built(),
            hvd.rocm_built(),
        )
    )


def test_ranks_on_nodes(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = as_nodes(world, PLACEMENTS["rank 0 alone, the others together"])
    monkeypatch.setattr(hvd.session._session, "world", nodes)
    assert hvd.is_homogeneous() == (world.size <= 2)
    first = world.rank <= 1  # of its node
    assert hvd.cross_size() == (min(world.size, 2) if first else 1)
    assert hvd.cross_rank() == (world.rank if first else 0)
    assert replace(nodes).local_rank == hvd.local_rank()


def test_ranks_of_a_communicator(initialized: None, world: mpidl.World) -> None:
    half = world.comm.Split(world.rank % 2, world.rank)
    hvd.init(half)
    assert (hvd.rank(), hvd.size()) == (half.rank, half.size)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == half.size
    hvd.shutdown()
    last = world.size - 1
    if world.rank == last:
        hvd.init([last])
        assert (hvd.rank(), hvd.size()) == (0, 1)
        assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == 1
    else:
        with pytest.raises(InvalidArgument, match="this one among them"):
            hvd.init([last])
    hvd.shutdown()


def test_process_sets(world: mpidl.World) -> None:
    size = world.size
    even, last = hvd.ProcessSet(list(range(0, size, 2))), None
    assert even.included() is None and even.rank() is None and even.size() is None
    if size > 1:
        assert hvd.add_process_set(even) is even
        assert even.included() == (world.rank % 2 == 0) and even.size() == (size + 1) // 2
        last = hvd.add_process_set([size - 1])
        assert last.rank() == (0 if world.rank == size - 1 else None)
        if even.included():
            mine = torch.full((2,), float(world.rank))
            total = sum(range(0, size, 2))
            assert hvd.allreduce(mine, op=hvd.Sum, process_set=even).tolist() == [total] * 2
            assert hvd.allreduce(mine, process_set=even).tolist() == [total / even.size()] * 2
            # the root is a rank of the world
            assert hvd.broadcast(mine, even.ranks[-1], process_set=even)[0] == even.ranks[-1]
            assert hvd.allgather(mine, process_set=even)[::2].tolist() == even.ranks
            assert hvd.allgather_object(world.rank, process_set=even) == even.ranks
            assert hvd.broadcast_object(world.rank, 0, process_set=even) == 0
            hvd.barrier(even)
            with pytest.raises(InvalidArgument, match="root_rank=1"):
                hvd.broadcast(mine, 1, process_set=even)
        else:
            with pytest.raises(InvalidArgument, match="not in it"):
                hvd.allreduce(torch.ones(2), process_set=even)
        if last.included():
            assert hvd.allreduce(torch.ones(2), op=hvd.Sum, process_set=last).tolist() == [1, 1]
        with pytest.raises(InvalidArgument, match="already"):
            hvd.add_process_set(list(range(0, size, 2)))
        with pytest.raises(RankMismatch):
            hvd.add_process_set([min(world.rank, 1)])
        assert hvd.remove_process_set(last) and hvd.remove_process_set(even)
        assert even.included() is None and not hvd.remove_process_set(even)
    with pytest.raises(InvalidArgument, match="already"):
        hvd.add_process_set(range(size))
    with pytest.raises(InvalidArgument, match="expected ranks"):
        hvd.add_process_set([size])
    assert not hvd.remove_process_set(hvd.global_process_set)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size


def test_sets_at_the_start(initialized: None, world: mpidl.World) -> None:
    if world.size < 3:
        pytest.skip("takes 3 ranks for two sets of two kinds")
    comm = world.comm.Split(world.rank % 2, world.rank)
    mine = hvd.ProcessSet(comm)
    both = hvd.ProcessSet([0, 1])
    hvd.init(process_sets=[mine, both])
    assert mine.ranks == list(range(world.rank % 2, world.size, 2))
    found = hvd.allgather(torch.tensor([world.rank]), process_set=mine)
    assert found.tolist() == mine.ranks
    if both.included():
        assert hvd.allgather(torch.tensor([world.rank]), process_set=both).tolist() == [0, 1]
    sessions.rebuild()
    assert hvd.allgather(torch.tensor([world.rank]), process_set=mine).tolist() == mine.ranks
    with pytest.raises(InvalidArgument, match="already"):  # also on ranks that are in the other
        hvd.add_process_set([0, 1])
    assert hvd.remove_process_set(mine)


def test_objects(world: mpidl.World, own: np.random.Generator) -> None:
    root = world.size - 1
    mine = {"rank": world.rank, "array": np.arange(world.rank), "tensor": torch.ones(2) * 3}
    found = hvd.broadcast_object(mine, root)
    assert found["rank"] == root and len(found["array"]) == root
    found["array"][:] = 0  # it can be written to
    assert hvd.broadcast_object_fn(root, "named")(world.rank) == root
    everyone = hvd.allgather_object("x" * world.rank)
    assert everyone == ["x" * rank for rank in range(world.size)]
    names = hvd.allgather_object(None, name="nothing")
    assert names == [None] * world.size


class Unpicklable:
    def __reduce__(self) -> str:
        raise TypeError("not this one")


def test_objects_that_cannot_be_pickled(world: mpidl.World) -> None:
    mine = Unpicklable() if world.rank == world.size - 1 else 1
    for send in (hvd.allgather_object, lambda x: hvd.broadcast_object(x, world.size - 1)):
        with pytest.raises(InvalidArgument, match=r"rank \d: Unpicklable: TypeError: not this one"):
            send(mine)
    assert hvd.allgather_object(world.rank) == list(range(world.size))


def test_files_are_given_back(initialized: None) -> None:
    counts = []
    for _ in range(4):
        hvd.init()
        hvd.allreduce(torch.ones(2))
        hvd.shutdown()
        files = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        counts.append(sum("timerfd" in str(path.readlink()) for path in files))
    assert len({*counts}) == 1


def test_a_rank_that_ends_hangs_nobody(initialized: None, world: mpidl.World) -> None:
    hvd.init()
    if world.rank:
        with pytest.raises(RankMismatch, match="the engine was closed there before rank 0"):
            hvd.allreduce(torch.ones(3), name="x")
    sessions._at_exit()  # comes to an end on rank 0 when the others are there
    assert not hvd.is_initialized()


def test_a_rank_that_ends_by_an_error_waits_for_nobody(
    initialized: None, monkeypatch: pytest.MonkeyPatch, world: mpidl.World
) -> None:
    hvd.init()
    assert hasattr(world.MPI._set_abort_status, "__wrapped__")  # it sets what follows
    monkeypatch.setattr(abort, "_statuses", [1])
    sessions._at_exit()
    assert hvd.is_initialized()


def spans_of(events: list[Any]) -> dict[tuple[str, str], list[Any]]:
    """Return the spans of each row, whose are one after the other or one in the other."""
    told: dict[Any, str] = {}
    rows: dict[tuple[str, str], list[Any]] = {}
    for e in events:
        place = (e["pid"], e["tid"]) if e["name"] == "thread_name" else e["pid"]
        if e["ph"] == "M":
            assert place not in told
            told[place] = e["args"]["name"]
            continue
        assert e["ph"] == "X" and e["ts"] >= 0 and e["dur"] >= 0
        row = rows.setdefault((told[e["pid"]], told[e["pid"], e["tid"]]), [])
        end = e["ts"] + e["dur"]
        for other in row:
            after = other["ts"] + other["dur"] <= e["ts"] + 1e-3  # us, of rounding
            within = other["ts"] <= e["ts"] and end <= other["ts"] + other["dur"] + 1e-3
            assert after or within, (other, e)
        row.append(e)
    return rows


def test_operations_before_shutdown_are_completed(initialized: None, world: mpidl.World) -> None:
    """In an order of each rank's own, waited for by none; those after it raise."""
    hvd.init()
    tensors = {f"x{i}": torch.full((3 + 30_000 * (i % 2),), float(i)) for i in range(8)}
    order = sorted(tensors, reverse=bool(world.rank % 2))
    handles = [hvd.allreduce_async_(tensors[name], op=hvd.Sum, name=name) for name in order]
    gathered = hvd.allgather_async(torch.ones(world.rank), name="rows")
    hvd.shutdown()
    for i, tensor in enumerate(tensors.values()):
        assert tensor.eq(i * world.size).all()
    for late in (lambda: hvd.allreduce(tensors["x0"]), lambda: hvd.synchronize(gathered), hvd.join):
        with pytest.raises(ValueError, match=r"call mpidl\.torch\.init"):
            late()
    hvd.init()
    for handle in (handles[0], gathered):
        with pytest.raises(ValueError, match="unknown"):
            hvd.synchronize(handle)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="x0").item() == world.size


def test_shutdown_ends_what_others_did_not_submit(initialized: None, world: mpidl.World) -> None:
    hvd.init()
    mine = torch.ones(2)
    if world.rank == 0:
        hvd.allreduce_async_(mine, op=hvd.Sum, name="of rank 0 alone")
    both = torch.ones(2)
    hvd.allreduce_async_(both, op=hvd.Sum, name="of all")
    hvd.shutdown()
    assert both.tolist() == [world.size] * 2
    assert mine.tolist() == [1, 1]


def test_functions_without_a_name(world: mpidl.World) -> None:
    pytest.importorskip("cloudpickle", reason="objects that pickle cannot take need cloudpickle")
    found = hvd.broadcast_object((lambda x: x + 40) if world.rank == 0 else None)
    assert found(2) == 42
    factors = hvd.allgather_object(lambda x, factor=world.rank: x * factor)
    assert [each(3) for each in factors] == [3 * rank for rank in range(world.size)]


def test_tensors_of_a_gpu_that_is_not_here(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They arrive on the CPU; that they come from a GPU is only said, here."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    mine = {"x": torch.arange(3.0) if world.rank == 0 else None}
    for found in (hvd.broadcast_object(mine)["x"], hvd.allgather_object(mine)[0]["x"]):
        assert found.device.type == "cpu" and found.tolist() == [0, 1, 2]


def test_timeline(world: mpidl.World, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    hvd.start_timeline(path)
    for _ in range(3):
        hvd.allreduce(torch.ones(4, 2), name="first")
    handle = hvd.grouped_allreduce_async([torch.ones(2), torch.ones(3)], name="second")
    if world.size > 1:
        with pytest.raises(RankMismatch):
            hvd.allreduce(torch.ones(world.rank + 1), name="wrong")
    hvd.synchronize(handle)
    left = hvd.allgather_async(torch.ones(2), name="left")
    hvd.stop_timeline()
    hvd.stop_timeline()  # does nothing
    hvd.synchronize(left)
    hvd.allreduce(torch.ones(1), name="after")
    assert path.exists() == (world.rank == 0)
    if world.rank:
        return
    rows = spans_of(json.loads(path.read_text()))
    phases = ["NEGOTIATE_ALLREDUCE", "ALLREDUCE", "MPI_ALLREDUCE"]
    packed = [*phases[:2], "MEMCPY_IN_FUSION_BUFFER", phases[2], "MEMCPY_OUT_FUSION_BUFFER"]
    for name, wanted in (("first", 3 * phases), ("second.0", packed), ("second.1", packed)):
        assert [e["name"] for e in rows["rank 0", name]] == wanted
    assert rows["rank 0", "left"][0]["name"] == "NEGOTIATE_ALLGATHER"
    waits = [e["name"] for e in rows["rank 0 waits", "MainThread"]]
    assert waits == ["first"] * 3 + ["wrong"] * (world.size > 1) + ["second.0", "second.1"]
    assert not any("after" in name for _, name in rows)
    found = rows["rank 0", "first"][1]
    assert found["args"]["shape"] == [4, 2] and found["args"]["dtype"] == "float32"
    if world.size > 1:
        (wrong,) = rows["rank 0", "wrong"]
        assert wrong["name"] == "NEGOTIATE_ALLREDUCE" and "shape" in wrong["args"]["error"]
    hvd.start_timeline(path)
    with pytest.raises(InvalidArgument, match="stop_timeline"):
        hvd.start_timeline(path)
    hvd.stop_timeline()


def test_names_of_horovod() -> None:
    for name in hvd.__all__:
        if name != "DataParallel":  # imported where it is asked for
            assert getattr(hvd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hvd.nothing  # noqa: B018
