"""Read TensorBoard's event files back: records of length, checksum, message, checksum."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any


def read(folder: Path) -> list[list[Any]]:
    """Return the events of each file in `folder`, by the time in its name."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    files = []
    for path in sorted(folder.glob("*tfevents*")):
        data, events, at = path.read_bytes(), [], 0
        while at < len(data):
            length, _, message = *struct.unpack_from("<QI", data, at), at + 12
            body = data[message : message + length]
            (sum_of_body,) = struct.unpack_from("<I", data, message + length)
            crc = crc32c(body)
            assert sum_of_body == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
            events.append(Event.FromString(body))
            at = message + length + 4
        files.append(events)
    return files


def shown(files: list[list[Any]]) -> dict[str, dict[int, Any]]:
    """Return tag -> step -> value, as TensorBoard shows it: a restart hides later steps."""
    found: dict[str, dict[int, Any]] = {}
    for event in (event for events in files for event in events):
        if event.HasField("session_log"):
            for steps in found.values():
                for step in [s for s in steps if s >= event.step]:
                    del steps[step]
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            found.setdefault(value.tag, {})[event.step] = getattr(value, kind)
    return found


def graph(files: list[list[Any]]) -> dict[str, Any]:
    """Return the nodes of the only graph, by name."""
    from tensorboardX.proto.graph_pb2 import GraphDef

    (text,) = [e.graph_def for events in files for e in events if e.graph_def]
    return {node.name: node for node in GraphDef.FromString(text).node}
