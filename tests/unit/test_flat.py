"""What tells of a leak in a soak (tests/chaos): it is found, and noise is not taken for one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.chaos.flat import BOUNDS, MIB, Samples, growth, problems

if TYPE_CHECKING:
    from pathlib import Path


def told(path: Path, rng: np.random.Generator, leak: float, steps: int = 4000) -> Path:
    """Write what a rank tells that keeps `leak` bytes a step, and a communicator every 200."""
    with path.open("w") as file:
        for step in range(0, steps, 20):
            settled = 1 - np.exp(-step / 200)
            memory = (
                50e6 + 3e6 * settled + leak * step + rng.normal(0, 2e5) + 4e6 * (step % 300 == 0)
            )
            values = dict.fromkeys(BOUNDS, 23 + int(step % 60 == 0))
            values.update(rss=memory, anonymous=memory, pss=memory)
            if leak:
                values["communicators"] += step // 200
            file.write(json.dumps({"time": 7.0 + step / 150, "steps": step, **values}) + "\n")
        file.write('{"time": 3')  # it was killed
    return path


def test_a_leak_is_found_and_noise_is_none(rng: np.random.Generator, tmp_path: Path) -> None:
    """Of 1 KB a step; and what is there for a short time, or taken once, is none."""
    assert problems(Samples.read(told(tmp_path / "well", rng, 0)).growths()) == []
    grown = Samples.read(told(tmp_path / "leaks", rng, 1024)).growths()
    assert grown["rss"] == pytest.approx(3000 * 1024, rel=0.15)
    found = problems(grown)
    names = [text.split()[0] for text in found]
    assert names == ["rss", "anonymous", "communicators"], found
    assert problems(grown, fewer=True) == found[-1:]
    assert problems(grown, recoveries=200) == found[-1:]
    assert problems({"pss": 5 * MIB}) and not problems({"pss": 3 * MIB})


def test_growth_is_the_slope_times_the_duration(rng: np.random.Generator) -> None:
    times = np.sort(rng.uniform(0, 100, 1500))
    slope = float(rng.uniform(-3, 3))
    found = growth(times, 5 + slope * times)
    assert found == pytest.approx(slope * (times[-1] - times[0]))


def test_few_samples_tell_nothing(tmp_path: Path) -> None:
    (tmp_path / "none").write_text("")
    assert Samples.read(tmp_path / "none").growths() == {}
