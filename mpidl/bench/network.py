"""Which of a host's addresses the other hosts of a job reach: for libraries that must be told."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import TYPE_CHECKING

from mpidl.errors import MpidlError

if TYPE_CHECKING:
    from mpidl.world import World

LOOPBACK = "127.0.0.1"
DISCARD = 9  # a port: nothing is sent there
SIOCGIFADDR = 0x8915  # netdevice(7): the IPv4 address of an interface


def own(world: World) -> tuple[str, str]:
    """Return the IPv4 address, and its interface, between this rank and other nodes. Collective.

    On one node those of the loopback. Raises MpidlError on every rank where a node cannot resolve
    the name of another one, or has no route to it.
    """
    if world.nodes == 1:
        return LOOPBACK, "lo"
    names = world.gather(world.MPI.Get_processor_name())
    other = world.members[1 if world.node == 0 else 0][0]
    with world.together():
        try:
            address = source(names[other])
        except OSError as error:
            raise MpidlError(f"no way to host {names[other]}: {error}") from error
        if address.startswith("127."):
            raise MpidlError(f"the name of host {names[other]} leads to {address}, to itself")
        name = interface(address)
    return address, name


def source(host: str) -> str:
    """Return the IPv4 address that packets to `host` would leave from. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, DISCARD))  # routes only: nothing is sent
        found: str = probe.getsockname()[0]
        return found


def interface(address: str) -> str:
    """Return the name of the interface with this IPv4 address. Raises MpidlError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("40s", name.encode())  # struct ifreq
            try:
                reply = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    raise MpidlError(f"no interface has the address {address}")
