"""`mpidl bench --device cuda`: its rows, on the stand-in, whose times mean nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from mpidl.bench import device_ranks, step_ranks
from mpidl.errors import MpidlError
from mpidl.strategies.device_hierarchical import DeviceHierarchical
from tests import stand_in_cuda
from tests.ranks.conftest import DEVICE, KERNELS

if TYPE_CHECKING:
    import mpidl

pytestmark = pytest.mark.skipif(
    DEVICE != "stand-in" or not KERNELS, reason="needs the stand-in and g++"
)


def test_averages_have_rows(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_OVERSUBSCRIBE", "1")
    with stand_in_cuda.changed(uuid=b"one for all"):
        report = device_ranks.measure(world, [4096, 40_000], 1)
    absent = {"nccl"} if world.size > 1 else set()
    assert set(report["absent"]) == absent
    names = set(device_ranks.NAMES) - absent
    for nbytes in (4096, 40_000):
        rows = [row for row in report["rows"] if row["bytes"] == nbytes]
        found = {(row["method"], row["what"]) for row in rows}
        assert found == {
            ("copy_bound", "bound"),
            *((name, what) for name in names for what in ("average", "reduce")),
        }
        (fused,) = [r for r in rows if (r["method"], r["what"]) == ("hierarchical", "reduce")]
        assert fused["moved_bytes"] == (world.size + 1) * nbytes
        assert fused["over_bound"] > 0
        assert all(row["low_s"] <= row["median_s"] <= row["high_s"] for row in rows)
    assert report["machine"]["gpu"] == "NVIDIA Stand-in"


def test_a_wrong_mean_ends_it(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = DeviceHierarchical.reduce

    def wrong(self: DeviceHierarchical, grad: object, weight: float) -> object:
        return reduce(self, grad, weight * 1.01)  # type: ignore[arg-type]

    monkeypatch.setattr(DeviceHierarchical, "reduce", wrong)
    with pytest.raises(MpidlError, match=r"hierarchical (reduce|average) is wrong by"):
        device_ranks.measure(world, [4096], 1)


def test_steps_have_rows(world: mpidl.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_OVERSUBSCRIBE", "1")
    if world.size == 1:
        pytest.skip("a mean of one is a part")
    methods = ["hierarchical", "nccl", "allreduce"]
    with stand_in_cuda.changed(uuid=b"one for all"):
        report = step_ranks.measure(world, ["cnn"], 1, methods, 2 * world.size, device="cuda")
    assert set(report["absent"]) == {"nccl"}
    found = {row["method"]: row["over_local"] for row in report["rows"]}
    assert set(found) == {"local", "hierarchical", "allreduce"}
    assert all(np.isfinite(list(found.values())))
