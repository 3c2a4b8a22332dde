"""Predictions: how long averaging takes on a machine that is not there yet. See docs/plan.md."""

from mpidl.plan.formulas import Link
from mpidl.plan.model import MODELS, Job, Times, predict, step, times
from mpidl.plan.topology import PAYLOAD, Constants, Topology

__all__ = [
    "MODELS",
    "PAYLOAD",
    "Constants",
    "Job",
    "Link",
    "Times",
    "Topology",
    "predict",
    "step",
    "times",
]
