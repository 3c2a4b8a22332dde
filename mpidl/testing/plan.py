"""Faults as JSON, for scripts that know nothing of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpidl import config
from mpidl.errors import InvalidArgument
from mpidl.refuse import WRONG, told
from mpidl.testing.faults import Corrupt, Hang, Kill, Raise, Slow, Stop

if TYPE_CHECKING:
    from mpidl.testing.faults import Fault

FAULTS: dict[str, Any] = {
    "Corrupt": Corrupt,
    "Hang": Hang,
    "Kill": Kill,
    "Raise": Raise,
    "Slow": Slow,
    "Stop": Stop,
}


@dataclass(frozen=True)
class Plan:
    """Faults, and the arguments of `inject` that go with them."""

    faults: tuple[Fault, ...] = ()
    seed: int = 0
    record: str | None = None


def faults_from_environment() -> Plan:
    """Return what MPIDL_FAULTS asks for; no faults where it is not set. See `parse`."""
    text = config.faults()
    return parse(text) if text else Plan()


def parse(text: str) -> Plan:
    """Return the plan in a text of JSON: {"faults": [...], "seed": 0, "record": FOLDER}.

    A fault is {"fault": "Kill", "rank": 1, "step": 20, ...}, with the arguments of its class. Only
    "faults" must be there. Raises InvalidArgument.
    """
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"faults: no JSON ({error}): {told(text)}") from error
    if not isinstance(found, dict) or not isinstance(found.get("faults"), list):
        raise InvalidArgument(f'faults: expected {{"faults": [...]}}: {text}')
    if unknown := set(found) - {"faults", "seed", "record"}:
        raise InvalidArgument(f"faults: expected faults, seed and record, not {sorted(unknown)}")
    seed, record = found.get("seed", 0), found.get("record")
    if not isinstance(seed, int) or seed < 0 or not isinstance(record, (str, type(None))):
        raise InvalidArgument(f"faults: {seed=}, {record=}: expected a number and a folder")
    return Plan(tuple(map(_fault, found["faults"])), seed, record)


def _fault(found: Any) -> Fault:
    kind = FAULTS.get(str(found.get("fault"))) if isinstance(found, dict) else None
    if kind is None:
        raise InvalidArgument(f'faults: {found}: expected "fault" to be of {", ".join(FAULTS)}')
    arguments = {name: value for name, value in found.items() if name != "fault"}
    if isinstance(arguments.get("step"), list):
        arguments["step"] = tuple(arguments["step"])
    try:
        made: Fault = kind(**arguments)
    except WRONG as error:
        raise InvalidArgument(f"faults: {found}: {error}") from error
    return made
