"""What a trace has of a training by `mpidl.torch.DataParallel`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

import mpidl  # noqa: E402
from mpidl import clock  # noqa: E402
from mpidl.torch.parallel import DataParallel  # noqa: E402
from mpidl.trace import analysis, parts, tracks  # noqa: E402
from mpidl.trace.recorder import Recorder  # noqa: E402

STEPS = 5


@pytest.mark.parametrize("strategy", ["hierarchical", "allreduce"])
def test_phases_steps_and_the_straggler(world: mpidl.World, strategy: str, tmp_path: Path) -> None:
    slow = world.size - 1
    module = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    model = DataParallel(module, optimizer, strategy, world=world)
    process = {"rank": world.rank, "seconds": time.perf_counter()}
    recorder = Recorder(tmp_path / "part", process, 10_000)
    with clock.folded():  # a phase of before ends
        pass
    recorder.resume()
    try:
        for _ in range(STEPS):
            optimizer.zero_grad()
            with mpidl.range("load"):
                time.sleep(0.02 * (world.rank == slow))
            model(torch.ones(4, 8)).sum().backward()
            optimizer.step()
    finally:
        recorder.close()
    part = parts.read(recorder.path)
    assert part is not None
    found = tracks.of_part(part, lambda times: times)
    assert [step.number for step in found.steps] == list(range(STEPS))
    for before, after in zip(found.phases, found.phases[1:], strict=False):
        assert before.end == pytest.approx(after.begin, abs=1e-6)
    spent = [sum(interval.of(phase) for interval in found.phases) for phase in range(6)]
    names = {clock.PHASES[phase] for phase in range(6) if spent[phase]}
    owned = {"update", "data"} if strategy == "hierarchical" and world.size > 1 else set()
    assert {"compute", "wait", "reduce", *owned} <= names
    processes = {
        rank: analysis.Process(f"rank {rank}", *told)
        for rank, told in enumerate(world.gather((found.phases, found.steps, found.spans)))
    }
    steps = analysis.steps_of(processes)[1:]
    assert len(steps) == STEPS - 1
    if world.size > 1:
        assert {step.last for step in steps} == {f"rank {slow}"}
        assert {step.because for step in steps} == {"range load"}
        assert all(step.late > 0.01 for step in steps)
    model.close()
