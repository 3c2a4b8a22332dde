"""Clocks of ranks that are compared, and parts of a trace that rank 0 does not see."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mpidl import clock as phases
from mpidl.bench import trace, trace_ranks
from mpidl.trace import clocks, parts, session

if TYPE_CHECKING:
    import numpy as np

    import mpidl


def test_clocks_of_machines_are_compared(world: mpidl.World) -> None:
    """Rank 0, ranks 1 and 2, and rank 3 are machines, each 3 s ahead of the one before."""
    machine = (world.rank + 1) // 2

    def clock() -> float:
        return time.perf_counter() + 3.0 * machine

    sample = clocks.measure(world.MPI, world.comm, f"m{machine}", clock)
    if machine == 0:
        assert sample is None
    else:
        assert sample is not None
        at, ahead, uncertainty = sample
        assert abs(ahead - 3.0 * machine) <= uncertainty + 1e-4
        assert 0 <= clock() - at < 60
    assert clocks.measure(world.MPI, world.comm, "one") is None


@pytest.mark.parametrize("size", [0, 999, 1000, 2500])
def test_parts_come_to_rank_0(
    world: mpidl.World, tmp_path: Path, size: int, own: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each rank has a folder of its own; the last one has no part."""
    monkeypatch.setattr(session, "CHUNK_BYTES", 1000)
    path = Path(world.broadcast(str(tmp_path))) / "t.json"
    data = own.bytes(size)
    mine = parts.place(tmp_path / "t.json", "0" * 16, world.rank, 1, f"host {world.rank}")
    last = world.size > 1 and world.rank == world.size - 1
    if not last:
        mine.write_bytes(data)
    session.collect(world.MPI, world.comm, path, mine)
    wanted = world.gather((mine.name, None if last else data))
    if world.rank == 0:
        found = {file.name: file.read_bytes() for file in path.parent.glob("t.json.*")}
        assert found == {name: data for name, data in wanted if data is not None}
    else:
        assert not mine.exists()
    world.barrier()


def test_a_full_disk_at_rank_0_keeps_the_parts(
    world: mpidl.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(world.broadcast(str(tmp_path)))
    mine = tmp_path / f"t.json.{'0' * 16}.{world.rank}-1-a.part"
    mine.write_bytes(b"x" * 100)
    if world.rank == 0:  # its folder takes nothing new
        monkeypatch.setattr(Path, "replace", None)
        monkeypatch.setattr(Path, "open", refuse)
    session.collect(world.MPI, world.comm, folder / "t.json", mine)
    monkeypatch.undo()
    assert mine.read_bytes() == b"x" * 100
    world.barrier()


def refuse(*_: object, **__: object) -> None:
    raise OSError("no space left")


def test_the_benchmark(
    world: mpidl.World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace_ranks, "MODELS", (("mlp", 4),))
    monkeypatch.setattr(trace_ranks, "BLOCK_SECONDS", 0.005)
    monkeypatch.setattr(trace_ranks, "LOOPS", 50)
    report = trace_ranks.measure(world, turns=1)
    (row,) = report["rows"]
    assert (row["samples"], row["ranks"]) == (4, world.size)
    # data, two ranges, the step, and phases: of the average and the update, and between
    assert 6 <= row["events"] <= 30
    assert row["off_ms"] > 0 and row["on_ms"] > 0 and row["by_parts"] > 1
    assert phases.listener is None
    trace.show(report)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
