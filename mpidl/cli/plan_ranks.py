"""Run by `mpidl plan --measure` in ranks: the constants of the machine, as JSON."""

from __future__ import annotations

from mpidl.bench import jobs
from mpidl.plan.measure import measure

if __name__ == "__main__":
    jobs.in_ranks(measure)
