"""The options that every example takes."""

from __future__ import annotations

import argparse


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the description as it was written."""


def positive(text: str) -> int:
    """Return a whole number from 1 on, such as a number of epochs."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected a whole number, 1 or more")
    return number


def parser(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """Return the parser, for options of the example's own; `defaults` as in `parse`."""
    made = argparse.ArgumentParser(description=description, formatter_class=Help)
    made.add_argument("--strategy", default="auto", help="how gradients are averaged")
    made.add_argument("--epochs", type=positive, default=10)
    made.add_argument("--batch-size", type=int, default=64, help="samples, all ranks together")
    made.add_argument("--seed", type=int, default=0, help="of weights and shuffling")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--out", metavar="RUN", help="folder for metrics.jsonl and config.json")
    made.set_defaults(**defaults)
    return made


def parse(description: str | None, **defaults: object) -> argparse.Namespace:
    """Read the command line; `defaults` (epochs, batch_size, ...) are the example's own."""
    return parser(description, **defaults).parse_args()
