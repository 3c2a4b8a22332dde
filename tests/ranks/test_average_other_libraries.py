"""`mpidl.average`: arrays of other libraries."""

from __future__ import annotations

import array

import numpy as np
import pytest

import mpidl
from mpidl.errors import RankMismatch
from tests.ranks.conftest import DEVICE

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="they lie in host memory")


def test_means(world: mpidl.World, own: np.random.Generator) -> None:
    values = own.standard_normal((7, 4)).astype(np.float32)
    mean = np.mean(world.gather(values), axis=0)
    half = np.mean(world.gather(torch.tensor(values).bfloat16().float().numpy()), axis=0)
    shared = values.copy()
    module = torch.nn.Linear(4, 7)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(values))
    columns = torch.tensor(values).t()
    brain = torch.tensor(values).bfloat16()
    plain = array.array("f", values.ravel())
    double = array.array("d", values.ravel())
    given = {
        "parameter": module.weight,
        "transposed": columns,
        "bfloat16": brain,
        "array": plain,
        "more": (double, memoryview(shared), torch.tensor(values).double()),
    }
    if world.rank == 0:  # one rank may hold another kind of array than the others
        given["parameter"] = module.weight.detach().numpy()
    assert mpidl.average(given) is given
    for found in (module.weight.detach(), columns.t(), np.reshape(plain, (7, 4)), shared):
        np.testing.assert_allclose(np.asarray(found), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.reshape(double, (7, 4)), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(given["more"][2].numpy(), mean, rtol=1e-6, atol=1e-6)
    # to the last bit of bfloat16: sums in another order may round to its neighbour
    np.testing.assert_allclose(brain.float().numpy(), half, rtol=2**-7, atol=1e-6)


def test_one_dtype_is_not_the_other(world: mpidl.World) -> None:
    if world.size == 1:
        pytest.skip("one rank always agrees with itself")
    dtype = torch.bfloat16 if world.rank else torch.float16
    with pytest.raises(RankMismatch, match=r"\(3,\) bfloat16, where rank 0 has .*\(3,\) float16"):
        mpidl.average(torch.zeros(3, dtype=dtype))
