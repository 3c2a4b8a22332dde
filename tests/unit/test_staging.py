"""Copies through pinned memory, on the stand-in: made as late as events allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpidl import staging
from mpidl.array import to_numpy
from mpidl.staging import Staging
from tests.unit.devices import device, installed


@pytest.fixture
def xp() -> Iterator[Any]:
    with installed() as cupy:
        yield cupy


@pytest.mark.parametrize("size", [1, 16, 17, 100])
def test_chunks_come_and_go_back(
    size: int, xp: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 64)
    made = Staging(None)  # type: ignore[arg-type]
    made.direct = False
    for _ in range(3):  # buffers are used again
        host = rng.standard_normal(size).astype(np.float32)
        there, seen = device(host), []

        def double(buffer: np.ndarray, seen: list[float] = seen) -> None:
            seen.extend(buffer.tolist())
            buffer *= 2

        end = 0
        for part in made.through(there, double):
            assert part.start == end
            end = part.stop
            down, up = made._streams
            assert xp.cuda.get_current_stream().ptr in down.knows  # made by what came before
            assert up.ptr in down.knows or end <= 32  # the buffer is free again
            there[part] += 1  # what the current stream does next comes after the copy
        assert end == size
        assert seen == host.tolist()
        np.testing.assert_array_equal(to_numpy(there), 2 * host + 1)
    made.close()


def test_the_next_chunk_is_on_its_way_meanwhile(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 64)
    made = Staging(None)  # type: ignore[arg-type]
    made.direct = False
    given = []
    for _ in made.through(xp.zeros(48, "f4"), lambda _: given.append(made._streams[0].given)):
        pass
    assert given == [2, 3, 3]  # copies asked for when the work on each begins
