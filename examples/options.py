"""The options that every example takes."""

from __future__ import annotations

import argparse


def parse(description: str | None, **defaults: object) -> argparse.Namespace:
    """Read the command line; `defaults` (epochs, batch_size, ...) are the example's own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--strategy", default="allreduce", help="how gradients are averaged")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="samples, all ranks together")
    parser.add_argument("--seed", type=int, default=0, help="of weights and shuffling")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", metavar="RUN", help="folder for metrics.jsonl and config.json")
    parser.set_defaults(**defaults)
    return parser.parse_args()
