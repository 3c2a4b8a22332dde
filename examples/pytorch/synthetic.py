"""How many pictures a second a convolutional network learns from: Horovod's usual benchmark.

mpidl run -n 2 examples/pytorch/synthetic.py --batch-size 16

A residual network in the shape of ResNet-18 (He et al. 2016), for pictures of 32 x 32, trains on
random ones. Only one line is not Horovod's: `import mpidl.torch as hvd`. Expect a rate for each
rank and for all, with 1.96 standard deviations, and all ranks on one machine to share its cores.
"""

from __future__ import annotations

import argparse
import timeit
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

import mpidl.torch as hvd


class Block(nn.Module):  # type: ignore[misc]
    """Two convolutions beside a shortcut: (n, inside, h, w) to (n, outside, h / stride, ...)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.shortcut = nn.Identity()
        if stride > 1 or inside != outside:
            across = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.shortcut = nn.Sequential(across, nn.BatchNorm2d(outside))

    def forward(self, x: Any) -> Any:  # noqa: D102
        return relu(self.body(x) + self.shortcut(x))


def network(width: int, classes: int = 1000) -> Any:
    """Return eight blocks of `width` to 8 x `width` channels."""
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inside = width
    for outside, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(inside, outside, stride), Block(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients in 16 bits")
    parser.add_argument("--use-adasum", action="store_true", help="combine steps by Adasum")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures of each rank")
    parser.add_argument("--width", type=int, default=64, help="channels of the first blocks")
    parser.add_argument("--num-warmup-batches", type=int, default=3)
    parser.add_argument("--num-batches-per-iter", type=int, default=5)
    parser.add_argument("--num-iters", type=int, default=5)
    args = parser.parse_args()

    hvd.init()
    torch.set_num_threads(1)  # of each rank
    model = network(args.width)
    rate = 0.01 if args.use_adasum else 0.01 * hvd.size()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    x = torch.randn(args.batch_size, 3, 32, 32)
    y = torch.randint(1000, (args.batch_size,))

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    def tell(line: str) -> None:
        if hvd.rank() == 0:
            print(line)

    tell(f"model          {sum(p.numel() for p in model.parameters()):,} parameters")
    timeit.timeit(step, number=args.num_warmup_batches)
    rates = []
    for i in range(args.num_iters):
        seconds = timeit.timeit(step, number=args.num_batches_per_iter)
        rates.append(args.batch_size * args.num_batches_per_iter / seconds)
        tell(f"iter {i + 1:<3}       {rates[-1]:.1f} img/s per rank")
    found = torch.tensor(rates)
    mean, spread = found.mean().item(), 1.96 * found.std(correction=0).item()
    tell(f"ranks          {hvd.size()}")
    tell(f"per rank       {mean:.1f} +- {spread:.1f} img/s")
    tell(f"total          {hvd.size() * mean:.1f} +- {hvd.size() * spread:.1f} img/s")


if __name__ == "__main__":
    main()
