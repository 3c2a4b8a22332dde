"""What the gradient's noise says of the batch size (McCandlish et al., 2018, arXiv:1812.06162)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpidl import noise
from mpidl.report import style
from mpidl.report.drawing import entry, logarithmic, plot, sheet, short, updates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpidl.report.drawing import Figure
    from mpidl.report.run import Run

LARGEST = 1e30  # samples: more are a damaged file's
LATE = 4  # the scale is that of the last quarter of the epochs: it grows while the loss falls


@dataclass(frozen=True)
class Noise:
    """The noise scale of a run, and its batch, both in samples."""

    scale: float
    batch: float
    estimates: int

    def updates(self, factor: float) -> float:
        """Return the updates to the same loss with `factor` times the batch, relative to now.

        S / S_min = 1 + B_crit / B, the paper's eq. 2.7 for the batch B, with B_crit = B_simple.
        """
        return (1 + self.scale / (factor * self.batch)) / (1 + self.scale / self.batch)

    def samples(self, factor: float) -> float:
        """Return the samples to the same loss, relative to now: E / E_min = 1 + B / B_crit."""
        return factor * self.updates(factor)

    def advice(self) -> str:
        """Return in words what a larger batch, or more ranks, would bring."""
        found = {"scale": self.scale, "batch": self.batch, "estimates": self.estimates}
        return "; ".join(noise.advice(found))


def of(run: Run) -> Noise | None:
    """Return the median scale of a run's last epochs; None where none was measured."""
    good = [e.noise for e in run.epochs if _positive(e.noise, "scale")]
    some = good[-max(1, len(good) // LATE) :]
    batches = [n["batch"] for n in some if _positive(n, "batch")]
    if not batches:
        return None
    counted = some[-1].get("estimates", math.nan)
    estimates = int(counted) if math.isfinite(counted) else 0
    return Noise(float(np.median([n["scale"] for n in some])), batches[-1], estimates)


def _positive(noise: dict[str, float], name: str) -> bool:
    value = noise.get(name, math.nan)
    return 1 / LARGEST < value < LARGEST


def figure(runs: Sequence[Run]) -> Figure | None:
    """Return the noise scale over updates, with the batch of each run."""
    with sheet("Gradient-noise scale", "updates", "samples") as made:
        every: list[float] = []
        says = []
        for i, run in enumerate(runs):
            of_run = "" if len(runs) == 1 else f"{run.name}, "
            some = [e for e in run.epochs if _positive(e.noise, "scale")]
            if not some:
                continue
            x, scales = [e.steps for e in some], [e.noise["scale"] for e in some]
            batches = [e.noise.get("batch", math.nan) for e in some]
            plot(made.panel, x, scales, **style.look(i))
            made.legend.append(entry(f"{of_run}noise scale", i))
            color = style.look(i)["color"]
            made.panel.step(
                [0, *x], [batches[0], *batches], where="pre", color=color, linestyle=":"
            )
            made.legend.append(entry(f"{of_run}batch", i, "dots", marked=False))
            every += [*scales, *batches]
            says.append(f"{run.name}: from {short(scales[0], 3)} to {short(scales[-1], 3)} samples")
        if not says:
            return None
        logarithmic(made.panel, every)
        if made.panel.get_yscale() == "linear":
            made.panel.set_ylim(bottom=0)
            style.counts(made.panel.yaxis)
        updates(made.panel, runs)
        note = "Below the line a larger batch is still worth its samples; far above it is not."
        return made.done("noise", "; ".join(says) + ".", note)
