"""Collectives submitted by name, in any order on each rank, beside NumPy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mpidl.collectives import Engine, Handle, Request, coordinator, driver, ids, known
from mpidl.collectives.halves import Halves, shares
from mpidl.errors import InvalidArgument, RankMismatch
from mpidl.world import World
from tests.ranks.conftest import DEVICE
from tests.ranks.test_adasum import tree

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="arrays in host memory only")

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float32", "float64"]
HALVES = ["float16", "bfloat16"]
SIZES = [0, 1, 7, 1000, 70_001]  # the last is not packed with others
SUMS = {
    "sum": np.add,
    "average": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "product": np.multiply,
}


@pytest.fixture(params=["thread", "no thread"])
def engine(
    request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    if request.param == "no thread":
        monkeypatch.setattr(World, "threads", False)
    made = Engine(world)
    yield made
    made.close()


def numbers(rng: np.random.Generator, shape: Any, dtype: str) -> np.ndarray:
    """Numbers of which a sum or product of four is exact, or close."""
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    low = 0 if dtype.startswith("u") else -3
    if dtype in INTEGERS:
        return rng.integers(low, 4, shape).astype(dtype)
    values = rng.standard_normal(shape)
    return to_half(values.astype(np.float32), dtype) if dtype in HALVES else values.astype(dtype)


def to_half(values: np.ndarray, dtype: str) -> np.ndarray:
    """As the engine is given it: bfloat16 as its bits."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.empty(values.size, np.uint16)
    Halves().encode(np.ascontiguousarray(values, np.float32).ravel(), bits, dtype)
    return bits.reshape(values.shape)


def wide(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        return values.astype(np.float32)
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def reduced(arrays: list[np.ndarray], dtype: str, op: str, pre: float = 1, post: float = 1) -> Any:
    """What `op` makes of all ranks' arrays, in their dtype, by NumPy."""
    total = wide(arrays[0], dtype)
    scaled = pre != 1 or post != 1
    if dtype in INTEGERS and scaled:
        arrays = [(a * pre).astype(dtype) for a in arrays]
        total = arrays[0]
    elif scaled:
        total = total * np.asarray(pre, total.dtype)
    for array in arrays[1:]:
        addend = wide(array, dtype)
        if scaled and dtype not in INTEGERS:
            addend = addend * np.asarray(pre, addend.dtype)
        total = SUMS[op](total, addend)
    if op == "average" and dtype in INTEGERS:
        total = np.trunc(total.astype(np.float64) * post / len(arrays))
    elif op == "average" or scaled:
        total = total * (post / (len(arrays) if op == "average" else 1))
    if dtype == "bfloat16":
        return wide(to_half(total, dtype), dtype)
    if dtype == "float16":
        return to_half(total.astype(np.float32), dtype)
    return total.astype(dtype)


def assert_reduced(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    if dtype in HALVES:  # one rounding may differ where float32's sum does
        tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
        np.testing.assert_allclose(
            wide(found, dtype), wide(expected, ""), rtol=tolerance, atol=1e-6
        )
    elif dtype in FLOATS:
        tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(found, expected)


LONG = [pytest.param(dtype, marks=pytest.mark.soak) for dtype in ("int16", "uint16", "uint32")]


@pytest.mark.parametrize(
    "dtype", [*FLOATS, *HALVES, "int8", "int32", "int64", "uint8", "uint64", "bool", *LONG]
)
def test_allreduce_of_all_ops_and_sizes(
    dtype: str, world: World, rng: np.random.Generator, own: np.random.Generator
) -> None:
    """In an order of its own on each rank; the third time by numbers."""
    engine = Engine(world)
    factors = [(1.0, 1.0)] if dtype == "bool" else [(1.0, 1.0), (0.5, 3.0)]
    cases = [
        (f"{op} {n} {pre}", n, op, pre, post)
        for n in SIZES
        for op in SUMS
        for pre, post in factors
        if not (dtype == "bool" and op == "average")
    ]
    for _ in range(3):
        arrays = {name: numbers(own, n, dtype) for name, n, *_ in cases}
        everyone = world.gather(arrays) if world.size > 1 else [arrays]
        expected = {
            name: reduced([given[name] for given in everyone], dtype, op, pre, post)
            for name, _, op, pre, post in cases
        }
        mine = {name: array.copy() for name, array in arrays.items()}
        handles = {}
        for i in own.permutation(len(cases)):
            name, _, op, pre, post = cases[i]
            handles[name] = engine.submit(
                Request(name, "allreduce", mine[name], dtype, op=op, prescale=pre, postscale=post)
            )
        for i in own.permutation(len(cases)):
            name = cases[i][0]
            assert engine.wait(handles[name]) is mine[name]
            assert_reduced(mine[name], expected[name], dtype)
        found = b"".join(mine[name].tobytes() for name in sorted(mine))
        assert len(set(world.gather(found))) == 1
    engine.close()


def test_rounding_and_range_of_halves(world: World, engine: Engine) -> None:
    """Sums are made in float32, and rounded once; one that is too large is infinite."""
    big = np.array([40000, -40000, 1, np.inf, 60000], np.float16)
    handle = engine.submit(Request("big", "allreduce", big.copy()))
    mean = engine.submit(Request("mean", "allreduce", big.copy(), op="average"))
    total = big.astype(np.float32) * world.size
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(engine.wait(handle), total.astype(np.float16))
    np.testing.assert_array_equal(engine.wait(mean), big)
    # 2048 + 1 + 1 + ... : float16 alone would stay at 2048
    odd = np.full(3, 2048 if world.rank == 0 else 1, np.float16)
    engine.wait(engine.submit(Request("odd", "allreduce", odd)))
    np.testing.assert_array_equal(odd, np.full(3, np.float32(2047 + world.size)).astype(np.float16))


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
def test_nan_stays_in_min_and_max(dtype: str, world: World, own: Any, engine: Engine) -> None:
    """Whichever rank has it, in all dtypes, in one number and in many."""
    for op in ("min", "max"):
        for n in (1, 40, 70_001):
            values = numbers(own, n, dtype)
            if world.rank == 0 or own.random() < 0.5:
                values[own.permutation(n)[: 1 + n // 4]] = to_half(
                    np.full(1, np.nan, np.float32), dtype
                ) if dtype in HALVES else np.nan  # fmt: skip
            everyone = world.gather(values)
            expected = reduced(everyone, dtype, op)
            part = values.copy()
            parts = engine.submit(Request(f"part {n}", "reducescatter", part, dtype, op=op))
            handle = engine.submit(Request(f"x {n}", "allreduce", values, dtype, op=op))
            found = wide(engine.wait(handle), dtype)
            assert np.isnan(found).any()
            np.testing.assert_array_equal(found, expected)
            start = sum(shares(n, world.size)[: world.rank])
            mine = wide(engine.wait(parts), dtype)
            np.testing.assert_array_equal(mine, expected[start : start + len(mine)])


def test_averages_of_integers_are_truncated(world: World, engine: Engine) -> None:
    array = np.array([7, -7, 1, -1, 49 * world.size, 2**62 // world.size], np.int64)
    mine = array * (world.rank == 0)
    mine[-1] = array[-1]
    engine.wait(engine.submit(Request("mean", "allreduce", mine, op="average")))
    size = world.size
    expected = [7 // size, -(7 // size), 1 // size, -(1 // size), 49, 2**62 // size]
    np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_adasum(
    dtype: str, world: World, rng: np.random.Generator, own: np.random.Generator,
    engine: Engine,
) -> None:  # fmt: skip
    common = rng.standard_normal((5, 13))
    arrays = [(common + own.standard_normal((5, 13))).astype(dtype) for _ in range(2)]
    handles = [
        engine.submit(Request(f"{i}", "allreduce", array.copy(), op="adasum"))
        for i, array in enumerate(arrays)
    ]
    for array, handle in zip(arrays, handles, strict=True):
        expected = tree([given.ravel() for given in world.gather(array)]).reshape(5, 13)
        tolerance = 4e-3 if dtype == "float16" else 1e-5
        np.testing.assert_allclose(engine.wait(handle), expected, rtol=tolerance, atol=tolerance)


def submit_everything(
    engine: Engine, world: World, own: np.random.Generator, ranks: tuple[int, ...], id_: int
) -> list[tuple[Handle, Any]]:
    """Submit each kind in an order of this rank's own, and return what to expect."""
    size, place = len(ranks), ranks.index(world.rank)
    rows = [r % 3 for r in ranks]
    splits = [[(a + b) % 3 for b in range(size)] for a in range(size)]
    root = size - 1

    def block(rank: int, n: int) -> np.ndarray:
        return (100 * rank + np.arange(3 * n)).reshape(n, 3).astype(np.float32)

    total = sum(block(r, 7).astype(np.float64) for r in ranks)
    starts = np.cumsum([0, *shares(7, size)])
    outgoing = [np.cumsum([0, *split]) for split in splits]
    received = [
        block(r, sum(splits[i]))[outgoing[i][place] : outgoing[i][place + 1]]
        for i, r in enumerate(ranks)
    ]
    cases: list[tuple[Request, Any]] = [
        (Request("reduce", "allreduce", block(world.rank, 7)), total),
        (Request("mean", "allreduce", block(world.rank, 7), op="average"), total / size),
        (
            Request("gather", "allgather", block(world.rank, rows[place])),
            np.concatenate([block(r, n) for r, n in zip(ranks, rows, strict=True)]),
        ),
        (Request("root", "broadcast", block(world.rank, 4), root=root), block(ranks[root], 4)),
        (Request("one", "broadcast", np.array(world.rank), root=root), np.array(ranks[root])),
        (
            Request(
                "swap", "alltoall", block(world.rank, sum(splits[place])),
                splits=tuple(splits[place]),
            ),
            np.concatenate(received),
        ),
        (
            Request("even", "alltoall", block(world.rank, 2 * size)),
            np.concatenate([block(r, 2 * size)[2 * place : 2 * place + 2] for r in ranks]),
        ),
        (
            Request("scatter", "reducescatter", block(world.rank, 7)),
            total[starts[place] : starts[place + 1]],
        ),
        (
            Request("half", "reducescatter", block(world.rank, 7).astype(np.float16), op="average"),
            (total / size)[starts[place] : starts[place + 1]],
        ),
        (Request("barrier", "barrier"), None),
    ]  # fmt: skip
    found = []
    for i in own.permutation(len(cases)):
        request, expected = cases[i]
        request = replace(request, process_set=id_)
        if own.random() < 0.2:
            time.sleep(own.uniform(0, 0.004))
        found.append((engine.submit(request), expected))
    return found


def check_everything(engine: Engine, found: list[tuple[Handle, Any]], own: Any) -> None:
    for i in own.permutation(len(found)):
        handle, expected = found[i]
        name = handle.request.name
        result = engine.wait(handle)
        assert engine.poll(handle)
        if expected is None:
            assert result is None
            continue
        assert result.shape == expected.shape, name
        tolerance = 1e-3 if name == "half" else 1e-6
        np.testing.assert_allclose(result, expected, rtol=tolerance, err_msg=name)
        if handle.request.kind in ("allgather", "alltoall"):
            assert handle.sizes is not None
            assert sum(handle.sizes) == len(result)


def test_all_kinds_in_any_order(world: World, own: np.random.Generator, engine: Engine) -> None:
    everyone = tuple(range(world.size))
    for _ in range(8):
        check_everything(engine, submit_everything(engine, world, own, everyone, 0), own)


def test_process_sets_with_crossing_orders(
    world: World, own: np.random.Generator, engine: Engine
) -> None:
    """Each rank submits to the sets in another order: none may wait in one for another."""
    sets = {0: tuple(range(world.size))}
    for ranks in (
        [world.size - 1],
        range(world.size),
        range(0, world.size, 2),
        range(1, world.size),
    ):
        if len(ranks):
            sets[engine.add_process_set(list(ranks)[::-1])] = tuple(ranks)
    assert list(sets) == list(range(len(sets)))
    mine = [i for i, ranks in sets.items() if world.rank in ranks]
    for i, ranks in sets.items():
        assert engine.ranks_of(i) == ranks
        if i not in mine:
            with pytest.raises(InvalidArgument, match=f"rank {world.rank} is not in it"):
                engine.submit(Request("x", "barrier", process_set=i))
    for _ in range(5):
        found = []
        for i in own.permutation(mine).tolist():
            found += submit_everything(engine, world, own, sets[i], i)
        check_everything(engine, found, own)
    for i in list(sets)[1:]:
        engine.remove_process_set(i)
        with pytest.raises(InvalidArgument, match=f"process set {i}: expected one that was added"):
            engine.ranks_of(i)
        with pytest.raises(InvalidArgument, match="expected one that was added"):
            engine.submit(Request("reduce", "allreduce", np.ones((7, 3), "f4"), process_set=i))
    everyone = sets[0]
    check_everything(engine, submit_everything(engine, world, own, everyone, 0), own)


def test_wrong_process_sets(world: World, engine: Engine) -> None:
    with pytest.raises(InvalidArgument, match="each once"):
        engine.add_process_set([0, 0])
    with pytest.raises(InvalidArgument, match=f"expected some of 0 to {world.size - 1}"):
        engine.add_process_set([world.size])
    with pytest.raises(InvalidArgument, match="process set 7: expected one that was added"):
        engine.remove_process_set(7)
    if world.size > 1:
        with pytest.raises(RankMismatch, match=r"rank 0: \(0,\); rank"):
            engine.add_process_set([min(world.rank, 1)])
        with pytest.raises(RankMismatch, match="rank 0: 0"):
            engine.remove_process_set(min(world.rank, 1))
    assert engine.add_process_set(range(world.size)) == 1
    pending = None
    if world.rank == 0 and world.size > 1:
        pending = engine.submit(Request("late", "barrier", process_set=1))
    engine.remove_process_set(1)
    if pending is not None:
        with pytest.raises(RankMismatch, match="process set 1 was removed before rank"):
            engine.wait(pending)


def test_a_thousand_small_ones(world: World, own: np.random.Generator, engine: Engine) -> None:
    """In all dtypes and shapes at once, new and by number, packed and unpacked."""
    for turn in range(4):
        requests = {}
        for i in own.permutation(1000).tolist():
            dtype = ["float32", "float64", "int32"][i % 3]
            array = np.full((i % 5, 1 + i % 7), i + world.rank, dtype)
            op = "average" if i % 2 else "sum"
            requests[i] = Request(f"grad.{i}", "allreduce", array, op=op)
        if turn == 1:
            time.sleep(0.01 * world.rank)
        handles = {i: engine.submit(request) for i, request in requests.items()}
        for i, handle in handles.items():
            total = world.size * i + sum(range(world.size))
            expected = total / world.size if i % 2 else total
            if i % 3 == 2:
                expected = int(expected)
            result = engine.wait(handle)
            np.testing.assert_allclose(result, np.full((i % 5, 1 + i % 7), expected), rtol=1e-6)


def test_progress_without_anybody_waiting(world: World) -> None:
    """In the thread; rank 0 too, which has nothing of its own in some sets."""
    if not world.threads:
        pytest.skip("an MPI without MPI_THREAD_MULTIPLE")
    engine = Engine(world)
    apart = engine.add_process_set(range(1, world.size) if world.size > 1 else [0])
    for turn in range(5):
        sets = [i for i in (0, apart) if world.rank in engine.ranks_of(i)]
        handles = [
            engine.submit(Request("x", "allreduce", np.full(4, 2.0), process_set=i)) for i in sets
        ]
        end = time.monotonic() + 60
        while not all(handle.done for handle in handles):
            assert time.monotonic() < end
            time.sleep(0.001 * turn)
        for i, handle in zip(sets, handles, strict=True):
            np.testing.assert_array_equal(
                engine.wait(handle), np.full(4, 2.0 * len(engine.ranks_of(i)))
            )
    engine.close()


def test_poll_alone_ends_it(world: World, engine: Engine) -> None:
    handle = engine.submit(Request("x", "allreduce", np.ones(3)))
    end = time.monotonic() + 60
    while not engine.poll(handle):
        assert time.monotonic() < end
    np.testing.assert_array_equal(engine.wait(handle), np.full(3, world.size))


def test_names_in_flight(world: World, engine: Engine) -> None:
    """One rank is late, so that nothing can be done before."""
    for turn in range(3):
        if world.rank == world.size - 1:
            world.barrier()
        first = engine.submit(Request("x", "allreduce", np.ones(3)))
        if world.rank < world.size - 1:
            with pytest.raises(InvalidArgument, match="'x' is in flight already"):
                engine.submit(Request("x", "allreduce", np.ones(3 + turn)))
            world.barrier()
        np.testing.assert_array_equal(engine.wait(first), np.full(3, world.size))


MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "kind": ({}, {"kind": "broadcast"}, "kind: .*allreduce.*broadcast"),
    "dtype": ({}, {"array": np.ones((2, 3), np.int64)}, "dtype: .*float64.*int64"),
    "op": ({}, {"op": "max"}, "op: .*sum.*max"),
    "shape": ({}, {"array": np.ones((3, 2))}, r"shape: .*\(2, 3\).*\(3, 2\)"),
    "factor": ({}, {"prescale": 2.0}, "prescale: .*1.0.*2.0"),
    "device": ({}, {"device": "cuda"}, "device: .*cpu.*cuda"),
    "root": ({"kind": "broadcast"}, {"root": 1}, "root: .*0.*1"),
    "columns": ({"kind": "allgather"}, {"array": np.ones((2, 4))}, "shape: .*3.*4"),
    "splits": ({"kind": "alltoall", "splits": None}, {"splits": (9,)}, r"splits \(9,\)"),
    "group": ({}, {"group": 5}, r"groups of other members: .*'x'; rank \d: 'x', 'and'"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_mismatches_are_raised_everywhere(
    what: str, world: World, own: np.random.Generator, engine: Engine
) -> None:
    common, other, match = MISMATCHES[what]
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    rows = 2 * world.size if what == "splits" else 2
    for turn in range(3):
        base: dict[str, Any] = {"kind": "allreduce", "array": np.ones((rows, 3))}
        options = base | common | (other if world.rank == world.size - 1 else {})
        options["array"] = options["array"].copy()
        if what == "group" and world.rank == world.size - 1:
            more = Request("and", "allreduce", np.ones(1), group=5)
            handle = engine.submit_all([Request("x", **options), more])[0]
        else:
            handle = engine.submit(Request("x", **options))
        good = engine.submit(Request("good", "allreduce", np.ones(2)))
        with pytest.raises(RankMismatch, match=match) as caught:
            engine.wait(handle)
        assert "'x'" in str(caught.value)
        assert caught.value.collective
        assert len(set(world.gather(str(caught.value)))) == 1
        np.testing.assert_array_equal(engine.wait(good), np.full(2, world.size))
        for _ in range(3 * (turn == 0)):  # between them as it should be, under the same name
            array = np.ones((2, 3))
            engine.wait(engine.submit(Request("x", "allreduce", array)))
            np.testing.assert_array_equal(array, np.full((2, 3), world.size))


WRONG: dict[str, tuple[Any, str]] = {
    "op": (lambda: Request("x", "allreduce", np.ones(2), op="mean"), "op 'mean': expected one of"),
    "kind": (lambda: Request("x", "reduce", np.ones(2)), "kind 'reduce': expected one of"),
    "root": (lambda: Request("x", "broadcast", np.ones(2), root=9), "root 9: expected a rank"),
    "text": (lambda: Request("x", "allreduce", np.array(["a"])), "dtype <U1: MPI cannot sum it"),
    "objects": (lambda: Request("x", "broadcast", np.array([None])), "dtype object"),
    "list": (lambda: Request("x", "allreduce", [1]), "list: expected a NumPy array"),  # type: ignore[arg-type]
    "gaps": (lambda: Request("x", "allreduce", np.ones((4, 4))[:, ::2]), "has gaps"),
    "bool": (lambda: Request("x", "allreduce", np.ones(2, bool), op="average"), "dtype bool"),
    "adasum": (lambda: Request("x", "allreduce", np.ones(2, int), op="adasum"), "floating-point"),
    "number": (lambda: Request("x", "allgather", np.array(1.0)), "one dimension or more"),
    "bits": (lambda: Request("x", "allreduce", np.ones(2), "bfloat16"), "expected uint16"),
    "splits": (lambda: Request("x", "alltoall", np.ones(2), splits=(3,)), r"splits \(3,\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_everywhere(what: str, world: World, engine: Engine) -> None:
    make, match = WRONG[what]
    for _ in range(2):
        with pytest.raises(InvalidArgument, match=match) as caught:
            engine.wait(engine.submit(make()))
        assert "'x'" in str(caught.value)
    if world.size > 1:
        right = Request("x", "allreduce", np.ones(2))
        with pytest.raises(RankMismatch, match=match):
            engine.wait(engine.submit(make() if world.rank == 0 else right))


def test_changes_under_one_name(world: World, own: np.random.Generator, engine: Engine) -> None:
    """Another shape or op on all ranks, or other rows on some; and all as before again."""
    for turn in range(18):
        n, op = 1 + turn // 2 % 3, ["sum", "max"][turn // 6 % 2]
        rows = int(own.integers(3)) if turn % 2 else 2
        array = np.full(n, world.rank + 1.0)
        handles = [
            engine.submit(Request("x", "allreduce", array, op=op)),
            engine.submit(Request("rows", "allgather", np.full((rows, 2), world.rank))),
        ]
        expected = world.size if op == "max" else sum(range(world.size + 1))
        np.testing.assert_array_equal(engine.wait(handles[0]), np.full(n, expected))
        gathered = engine.wait(handles[1])
        assert handles[1].sizes == tuple(world.gather(rows))
        np.testing.assert_array_equal(
            gathered[:, 0], np.repeat(range(world.size), handles[1].sizes)
        )


def test_what_was_refused_is_not_taken_for_known(world: World, engine: Engine) -> None:
    """What rank 0 gave in vain is refused again, also after others have given something else."""
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    wrong = (2, 5) if world.rank == 0 else (2, 3)
    right, other = (2, 3), (2 + (world.rank > 0), 3)
    for i, shape in enumerate([right, right, right, wrong, other, wrong]):
        handle = engine.submit(Request("rows", "allgather", np.ones(shape)))
        if i in (3, 5):
            with pytest.raises(RankMismatch, match="shape"):
                engine.wait(handle)
        else:
            assert engine.wait(handle).shape == (sum(handle.sizes or ()), 3)


def test_groups(world: World, own: np.random.Generator, engine: Engine) -> None:
    """Of one group none is done before all were submitted; alone in between."""
    for turn in range(6):
        names = ["a", "b", "c"] if turn != 4 else ["a", "b"]
        alone = engine.submit(Request("alone", "allreduce", np.ones(2)))
        if world.rank == 0 and turn < 2:
            engine.wait(alone) if world.size == 1 else time.sleep(0.01)
        arrays = [np.full(3, i + world.rank, np.float32) for i in range(len(names))]
        requests = [
            Request(name, "allreduce", array, group=turn)
            for name, array in zip(names, arrays, strict=True)
        ]
        if turn == 3:  # the members by themselves, and then as a group again
            handles = [engine.submit(replace(r, group=None)) for r in own.permutation(requests)]
        else:
            handles = engine.submit_all(requests)
        for handle in handles:
            engine.wait(handle)
        engine.wait(alone)
        for i, array in enumerate(arrays):
            expected = world.size * i + sum(range(world.size))
            np.testing.assert_array_equal(array, np.full(3, expected))
    with pytest.raises(InvalidArgument, match="requests of one process set"):
        engine.submit_all(
            [Request("p", "barrier", group=9), Request("q", "barrier", group=9, process_set=1)]
        )


def test_join(world: World, own: np.random.Generator, engine: Engine) -> None:
    """Rank r makes r more steps than rank 0; each name is known before, or new while some wait."""
    order = []
    for turn in range(3):
        steps = (world.rank + turn) % world.size + 1
        for step in range(world.size):
            if step >= steps:
                break
            here = [r for r in range(world.size) if (r + turn) % world.size + 1 > step]
            array, mean = np.full(5, 2.0), np.full((2, 2), 2.0, np.float16)
            handles = [
                engine.submit(Request(f"sum.{step % 2}", "allreduce", array)),
                engine.submit(Request(f"mean.{turn}", "allreduce", mean, op="average")),
                engine.submit(Request("rows", "allgather", np.full((2, 2), world.rank))),
                engine.submit(Request("scatter", "reducescatter", np.ones(world.size))),
                engine.submit(Request("barrier", "barrier")),
            ]
            results = [engine.wait(handle) for handle in handles]
            np.testing.assert_array_equal(array, np.full(5, 2.0 * len(here)))
            np.testing.assert_allclose(mean, 2 * len(here) / world.size, rtol=1e-3)
            np.testing.assert_array_equal(results[2][:, 0], np.repeat(here, 2))
            np.testing.assert_array_equal(results[3], [len(here)])
        order.append(engine.join())
    assert len(set(world.gather(tuple(order)))) == 1
    for last, turn in zip(order, range(3), strict=True):
        assert (last + turn) % world.size == world.size - 1  # who makes most steps
    check_everything(
        engine, submit_everything(engine, world, own, tuple(range(world.size)), 0), own
    )


def test_what_cannot_be_while_a_rank_has_joined(world: World, engine: Engine) -> None:
    if world.size == 1:
        assert engine.join() == 0
        return
    told = []
    if world.rank:
        root = engine.submit(Request("x", "broadcast", np.ones(2), root=0))
        with pytest.raises(RankMismatch, match="rank 0, its root, has joined"):
            engine.wait(root)
        even = engine.submit(Request("y", "alltoall", np.ones(world.size)))
        with pytest.raises(RankMismatch, match="alltoall: rank 0 has joined"):
            engine.wait(even)
        for op in ("min", "max", "product"):
            spoiled = engine.submit(Request(op, "allreduce", np.full(2, -3.0), op=op))
            with pytest.raises(RankMismatch, match=f"allreduce by {op}: rank 0 has joined") as no:
                engine.wait(spoiled)
            assert no.value.collective
            told.append(str(no.value))
        with pytest.raises(RankMismatch, match="add_process_set: rank 0 has joined"):
            engine.add_process_set([1])
        other = np.full(2, world.rank)
        engine.wait(engine.submit(Request("z", "broadcast", other, root=1)))
        np.testing.assert_array_equal(other, [1, 1])
    engine.join()
    assert len({*map(tuple, world.gather(told)[1:])}) == 1


def test_more_names_than_ids(
    world: World, own: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old names come no more, and new ones get their ids, which late ranks may still submit."""
    few = 32
    for module in (ids, known, coordinator, driver):
        monkeypatch.setattr(module, "IDS", few)
    made = Engine(world)
    everything: set[int] = set()
    for turn in range(120):
        first = turn // 4 * 7  # each name is there for some turns
        names = [f"{n}" for n in range(first, first + 22)]
        arrays = {name: np.full(3, int(name) + world.rank, np.float32) for name in names}
        group = [f"g{turn // 6}", f"h{turn // 6}"]
        handles = [
            made.submit(Request(name, "allreduce", arrays[name])) for name in own.permutation(names)
        ]
        handles += made.submit_all(
            [Request(name, "allreduce", np.ones(2), group=turn // 6) for name in group]
        )
        for handle in handles:
            made.wait(handle)
        for name, array in arrays.items():
            total = world.size * int(name) + sum(range(world.size))
            np.testing.assert_array_equal(array, np.full(3, total))
        np.testing.assert_array_equal(handles[-1].result, np.full(2, world.size))
        everything |= {i for i, _ in made._driver.known.ids.values()}
    assert everything == set(range(few))
    latest = {(0, name) for name in names}
    assert len(latest & made._driver.known.ids.keys()) > 10
    assert len(made._driver.known.ids) <= few and len(made._driver._tasks) <= 3 * few
    made.close()


def test_unnamed_ones_leave_plans_alone(world: World) -> None:
    engine = Engine(world)
    for i in range(6):
        engine.wait(engine.submit(Request("x", "allreduce", np.ones(3))))
        if i == 3:
            kept = dict(engine._driver._plans)
        engine.wait(engine.submit(Request(f"once.{i}", "allreduce", np.ones(3))))
    assert kept and all(engine._driver._plans.get(key) is plan for key, plan in kept.items())
    engine.close()


def test_a_request_of_wrong_factors_leaves_its_name(world: World, engine: Engine) -> None:
    for wrong in ("x", None, float("nan")):
        bad: Any = wrong
        with pytest.raises(InvalidArgument, match="expected numbers"):
            engine.wait(engine.submit(Request("n", "allreduce", np.ones(2), prescale=bad)))
    array = np.ones(2)
    engine.wait(engine.submit(Request("n", "allreduce", array)))
    np.testing.assert_array_equal(array, world.size)


def test_what_leaves_keeps_the_thread_awake(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(world)
    engine.wait(engine.submit(Request("x", "barrier")))
    driver = engine._driver
    assert not driver.in_flight
    if world.rank or world.size == 1:
        engine.close()
        return
    with driver._lock:
        monkeypatch.setattr(driver.link, "_leaving", [(_Late(), b"")])
        assert driver._busy()
    engine.close()


class _Late:
    """A message that leaves at the third look."""

    looks = 0

    def Test(self) -> bool:
        self.looks += 1
        return self.looks > 2


def test_who_is_waited_for_is_told_once(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if world.size == 1 or not world.threads:
        pytest.skip("nobody to wait for, or no thread to tell")
    monkeypatch.setenv("MPIDL_STALL_SECONDS", "0.1")
    engine = Engine(world)
    for late in (0, world.size - 1):
        for name in ("new", "known"):
            for _ in range(3 * (name == "known")):
                engine.wait(engine.submit(Request(f"known.{late}", "allreduce", np.ones(3))))
            world.barrier()
            capfd.readouterr()
            if world.rank == late:
                time.sleep(0.4)
            engine.wait(engine.submit(Request(f"{name}.{late}", "allreduce", np.ones(3))))
            told = capfd.readouterr().err
            assert told.count(f"allreduce '{name}.{late}' waits for rank {late} since") == (
                world.rank == 0
            ), told
            assert (told.count("\n") == 1) == (world.rank == 0)
            world.barrier()
    engine.close()


def test_close_ends_what_can_no_more_be_done(world: World) -> None:
    engine = Engine(world)
    both = engine.submit(Request("both", "allreduce", np.ones(3)))
    one = engine.submit(Request("one", "allreduce", np.ones(3))) if world.rank == 0 else None
    engine.close()
    np.testing.assert_array_equal(engine.wait(both), np.full(3, world.size))
    if one is not None and world.size > 1:
        with pytest.raises(RankMismatch, match="the engine was closed there before rank"):
            engine.wait(one)
    engine.close()
    with pytest.raises(InvalidArgument, match="closed"):
        engine.submit(Request("x", "allreduce", np.ones(3)))
    with pytest.raises(InvalidArgument, match="closed"):
        engine.join()


def test_one_that_waits_is_told_where_another_closes(world: World) -> None:
    engine = Engine(world)
    if world.rank == 0 and world.size > 1:
        with pytest.raises(RankMismatch, match="'x': the engine was closed there before rank"):
            engine.wait(engine.submit(Request("x", "barrier")))
    engine.close()


def test_an_error_in_the_driver_reaches_all_who_wait(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(world)
    names = [f"x{i}" for i in range(3)]
    for name in names:
        engine.wait(engine.submit(Request(name, "barrier")))

    def broken(*_: Any) -> None:
        raise OSError("broken")

    monkeypatch.setattr(engine._driver.executor, "_single", broken)
    monkeypatch.setattr(engine._driver.executor, "_together", broken)
    lone = [Request("never", "barrier")] if world.rank == 0 and world.size > 1 else []
    requests = lone + [Request(name, "allreduce", np.ones(2)) for name in names]
    for handle in [engine.submit(request) for request in requests]:
        with pytest.raises(OSError, match="broken"):
            engine.wait(handle)
    with pytest.raises(OSError, match="broken"):
        engine.submit(Request("later", "barrier"))
    engine.close()
