"""Faults on purpose, to see what a training run does when a rank dies, stops, or is wrong.

    from mpidl.testing import Kill, Slow, inject

    with inject(trainer, Kill(rank=1, step=20, moment="reduce"), Slow(rank=2, seconds=0.1)):
        trainer.fit(...)

A script is disturbed without changing it by

    export MPIDL_FAULTS='{"faults": [{"fault": "Kill", "rank": 1, "step": 20}], "seed": 7}'
    mpidl run -n 4 -m mpidl.testing train.py ARGUMENTS...

Where no fault is injected, nothing is added to any step.
"""

from mpidl.testing.cut import Cut
from mpidl.testing.faults import MOMENTS, Corrupt, Fault, Hang, Kill, Raise, Slow, Stop
from mpidl.testing.injector import inject
from mpidl.testing.plan import Plan, faults_from_environment, parse

__all__ = [
    "MOMENTS",
    "Corrupt",
    "Cut",
    "Fault",
    "Hang",
    "Kill",
    "Plan",
    "Raise",
    "Slow",
    "Stop",
    "faults_from_environment",
    "inject",
    "parse",
]
