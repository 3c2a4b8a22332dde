"""CuPy: a network written out by hand, on a GPU for each rank, or with NumPy on the CPU.

mpidl run -n 2 examples/frameworks/cupy_digits.py --device cuda
"""

import argparse
from itertools import pairwise
from typing import Any

import mpidl
from mpidl import data
from mpidl.array import Array, device_namespace, to_numpy

SIZES = 64, 256, 128, 10


def forward(xp: Any, layers: list[tuple[Array, Array]], x: Array) -> list[Array]:
    """Return what goes into each layer (n, inputs), and the scores (n, 10)."""
    passed = [x]
    for i, (w, b) in enumerate(layers):
        z = passed[-1] @ w + b
        passed.append(xp.maximum(z, 0) if i < len(layers) - 1 else z)
    return passed


def backward(
    xp: Any, layers: list[tuple[Array, Array]], passed: list[Array], y: Array
) -> list[tuple[Array, Array]]:
    """Return the gradients of the mean cross-entropy, as `layers`; y is (n,)."""
    grad = xp.exp(passed[-1] - passed[-1].max(1, keepdims=True))
    grad /= grad.sum(1, keepdims=True)
    grad[xp.arange(len(y)), y] -= 1
    grad /= len(y)
    found = []
    for (w, _), x in zip(reversed(layers), passed[-2::-1], strict=True):
        found.append((x.T @ grad, grad.sum(0)))
        grad = (grad @ w.T) * (x > 0)
    return found[::-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    world = mpidl.init()
    xp = device_namespace(args.device)
    normal = xp.random.RandomState(0).standard_normal
    layers = [
        ((normal((n, m)) * (2 / n) ** 0.5).astype(xp.float32), xp.zeros(m, xp.float32))
        for n, m in pairwise(SIZES)
    ]
    mpidl.average(layers, weight=world.rank == 0)  # all start from what rank 0 drew
    speeds = [[xp.zeros_like(a) for a in layer] for layer in layers]
    train, test = data.digits()
    for epoch in range(args.epochs):
        options = {"world": world, "epoch": epoch, "device": args.device}
        for x, y in data.batches(train, 64, **options):
            grads = backward(xp, layers, forward(xp, layers, x), y)
            mpidl.average(grads, weight=len(x))
            for layer, grad, speed in zip(layers, grads, speeds, strict=True):
                for a, g, v in zip(layer, grad, speed, strict=True):
                    v *= 0.9
                    v += g
                    a -= 0.1 * v
    scores = to_numpy(forward(xp, layers, xp.asarray(test.x))[-1])
    accuracy = (scores.argmax(1) == test.y).mean()
    print(f"rank {world.rank}: test accuracy {accuracy:.2%}, sum of scores {abs(scores).sum():.9g}")


if __name__ == "__main__":
    main()
