"""One body for every strategy, on every number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl.array import to_numpy
from mpidl.errors import InvalidArgument, RankMismatch, UnknownStrategy
from mpidl.strategies import Hierarchical, ParameterServer, Ring, Strategy, make
from tests.ranks.conftest import DEVICE, PLACEMENTS, STRATEGIES, as_nodes

RANKS = mpidl.init().size
VARIANTS: dict[str, Callable[[mpidl.World], Strategy]] = {
    **STRATEGIES,
    "ring, chunks of 64 bytes": partial(Ring, chunk_bytes=64),
    "ring, chunks of 4 KiB": partial(Ring, chunk_bytes=4096),
    **{f"{s} servers": partial(ParameterServer, servers=s) for s in range(2, RANKS + 1)},
}
if DEVICE == "cpu" and RANKS == 3:  # in nodes of one and of two
    VARIANTS |= {
        f"hierarchical, {name}": lambda world, node_of=node_of: Hierarchical(
            as_nodes(world, node_of)
        )
        for name, node_of in PLACEMENTS.items()
    }
LENGTHS = [0, 1, 7, 1024, 1_000_000]
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}


@pytest.fixture(params=VARIANTS)
def strategy(request: pytest.FixtureRequest, world: mpidl.World) -> Any:
    made = VARIANTS[request.param](world)
    yield made
    made.close()


def skip_many_messages(strategy: Strategy, length: int) -> None:
    if isinstance(strategy, Ring) and strategy.chunk_bytes == 64 and length > 10_000:
        pytest.skip("the shorter lengths cover chunks of 64 bytes; this is 125,000 messages")


def reduced(strategy: Strategy, grad: Any, weight: float) -> slice:
    """Put the mean into the owned part, and return that; no gaps, and each once."""
    owned = strategy.owned(grad.size)
    end = owned.start
    for part, mean in strategy.reduce(grad, weight):
        assert part.start == end
        assert mean.shape == (part.stop - part.start,)
        assert mean.dtype == grad.dtype
        grad[part] = mean
        end = part.stop
    assert end == owned.stop
    return owned


def shares_of(world: mpidl.World, own: np.random.Generator) -> list[float]:
    """Weights that add up to 1, all different; rank 0 has none where others have some."""
    mine = float(own.uniform(0.5, 2)) if world.rank or world.size == 1 else 0.0
    weights = world.gather(mine)
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", LENGTHS)
def test_owned_part_holds_the_weighted_mean(
    strategy: Strategy, n: int, dtype: str, world: mpidl.World, own: np.random.Generator, xp: Any
) -> None:
    skip_many_messages(strategy, n)
    weights = shares_of(world, own)
    local = own.standard_normal(n).astype(dtype)
    _, grad = strategy.allocate(n, np.dtype(dtype), xp)
    grad[:] = xp.asarray(local)
    owned = reduced(strategy, grad, weights[world.rank])
    expected = sum(
        w * np.float64(part) for w, part in zip(weights, world.gather(local), strict=True)
    )
    np.testing.assert_allclose(
        to_numpy(grad)[owned], expected[owned], rtol=0, atol=4 * TOLERANCES[dtype]
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_owned_parts_cover_the_vector(
    strategy: Strategy, n: int, world: mpidl.World, xp: Any
) -> None:
    skip_many_messages(strategy, n)
    _, grad = strategy.allocate(n, np.dtype("float32"), xp)
    owned = reduced(strategy, grad, 1 / world.size)
    covered = np.zeros(n, bool)
    for part in world.gather(owned):
        covered[part] = True
    assert covered.all()


@pytest.mark.parametrize("n", LENGTHS)
def test_share_publishes_what_the_owners_wrote(
    strategy: Strategy, n: int, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    skip_many_messages(strategy, n)
    param, grad = strategy.allocate(n, np.dtype("float64"), xp)
    owned = reduced(strategy, grad, 1 / world.size)
    new = rng.standard_normal(n)
    param[owned] = xp.asarray(new[owned])
    strategy.share(param)
    np.testing.assert_array_equal(to_numpy(param), new)


@pytest.mark.parametrize("n", LENGTHS)
def test_the_whole_mean_comes_to_all(
    strategy: Strategy, n: int, world: mpidl.World, own: np.random.Generator, xp: Any
) -> None:
    skip_many_messages(strategy, n)
    weights = shares_of(world, own)
    _, grad = strategy.allocate(n, np.dtype("float64"), xp)
    for _ in range(2):  # the second follows at once
        local = own.standard_normal(n)
        grad[:] = xp.asarray(local)
        for part, mean in strategy.reduce(grad, weights[world.rank]):
            strategy.keep(grad, part, mean)
        strategy.complete(grad)
        expected = sum(w * part for w, part in zip(weights, world.gather(local), strict=True))
        found = to_numpy(grad).copy()
        world.barrier()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_total_counts_each_element_once(
    strategy: Strategy, rng: np.random.Generator, world: mpidl.World, xp: Any
) -> None:
    values = rng.standard_normal(1001)
    _, grad = strategy.allocate(1001, np.dtype("float64"), xp)
    owned = reduced(strategy, grad, 1 / world.size)
    found = strategy.total([float(values[owned].sum()), float(len(values[owned]))])
    np.testing.assert_allclose(found, [values.sum(), 1001], rtol=1e-12)


@pytest.mark.parametrize("n", [7, 100_003])
def test_same_bits_in_every_run_and_on_every_owner(
    strategy: Strategy, n: int, world: mpidl.World, own: np.random.Generator, xp: Any
) -> None:
    skip_many_messages(strategy, n)
    local = own.standard_normal(n).astype(np.float32)
    outcomes = []
    for _ in range(3):
        param, grad = strategy.allocate(n, np.dtype("float32"), xp)
        grad[:] = xp.asarray(local)
        owned = reduced(strategy, grad, 1 / world.size)
        param[owned] = grad[owned]
        strategy.share(param)
        outcomes.append(to_numpy(param).tobytes())
    assert len(set(outcomes)) == 1
    assert len(set(world.gather(outcomes[0]))) == 1


def test_arrays_of_two_dtypes_take_turns(
    strategy: Strategy, world: mpidl.World, own: np.random.Generator, xp: Any
) -> None:
    made = {dtype: strategy.allocate(1024, np.dtype(dtype), xp) for dtype in TOLERANCES}
    for _ in range(2):
        for dtype, (param, grad) in made.items():
            local = own.standard_normal(1024).astype(dtype)
            grad[:] = xp.asarray(local)
            owned = reduced(strategy, grad, 1 / world.size)
            expected = np.mean(world.gather(local), axis=0, dtype=np.float64)
            np.testing.assert_allclose(
                to_numpy(grad)[owned], expected[owned], rtol=0, atol=4 * TOLERANCES[dtype]
            )
            strategy.share(param)


def test_arrays_are_zeroed_and_apart(strategy: Strategy, xp: Any) -> None:
    param, grad = strategy.allocate(1000, np.dtype("float32"), xp)
    assert isinstance(param, xp.ndarray)
    assert not to_numpy(param).any()
    assert not to_numpy(grad).any()
    grad[:] = 1
    assert not to_numpy(param).any()


def test_servers_own_equal_parts_on_ranks_spread_evenly(world: mpidl.World, xp: Any) -> None:
    for servers in range(1, world.size + 1):
        strategy = ParameterServer(world, servers)
        _, grad = strategy.allocate(1000, np.dtype("float32"), xp)
        parts = world.gather(reduced(strategy, grad, 1 / world.size))
        lengths = [part.stop - part.start for part in parts if part.stop > part.start]
        assert len(lengths) == servers
        assert max(lengths) - min(lengths) <= 1


def test_number_of_servers_is_checked(world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument, match="servers=0: expected a whole number from 1 on"):
        ParameterServer(world, 0)
    with pytest.raises(InvalidArgument, match=f"1 to {world.size}"):
        ParameterServer(world, world.size + 1)
    with pytest.raises(InvalidArgument, match="from 64 on"):
        Ring(world, chunk_bytes=8)


def test_unknown_name_is_raised_on_every_rank(world: mpidl.World) -> None:
    wrong = "smoke signals" if world.rank == world.size - 1 else "ring"
    known = "allreduce, auto, hierarchical, horovod, nccl, parameter_server, ring, sharded"
    with pytest.raises(UnknownStrategy, match=f"smoke signals.*{known}"):
        make(wrong, world)


def test_ranks_must_name_the_same(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    with pytest.raises(RankMismatch, match="strategy: ring, but rank 0 has allreduce"):
        make("ring" if world.rank == 1 else "allreduce", world)


def test_an_instance_is_taken_as_it_is(world: mpidl.World) -> None:
    ring = Ring(world)
    assert make(ring, world).strategy is ring


def test_options_must_be_the_same(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    with pytest.raises(
        RankMismatch, match=r"rank 1: strategy: Ring\(chunk_bytes=128, .*\), but rank 0"
    ):
        make(Ring(world, 128 if world.rank == 1 else 64), world)
    with pytest.raises(RankMismatch, match=r"ParameterServer\(servers=2\b"):
        make(ParameterServer(world, 2 if world.rank == 1 else 1), world)


def test_a_class_is_no_strategy(world: mpidl.World) -> None:
    with pytest.raises(InvalidArgument, match=r"expected a name or Ring\(world"):
        make(Ring, world)  # type: ignore[arg-type]


def test_a_strategy_may_know_its_rank(world: mpidl.World) -> None:
    """What it keeps besides its options may differ between ranks."""

    class Mine:
        allocate = None

        def __init__(self, world: mpidl.World, option: int) -> None:
            self.option, self.rank = option, world.rank

    strategy = Mine(world, 1)
    assert make(strategy, world).strategy is strategy  # type: ignore[arg-type,comparison-overlap]
    if world.size > 1:
        with pytest.raises(
            RankMismatch, match=r"Mine\(option=1\), but rank 0 has Mine\(option=0\)"
        ):
            make(Mine(world, int(world.rank > 0)), world)  # type: ignore[arg-type]
