"""A host whose link is cut for a while.

Filters of `tc` take each packet that comes or is to leave, and tell nobody, as a pulled cable does:
the link stays up, so addresses, routes and connections are still there when it heals. That takes
Linux 4.5, with `clsact` and the classifier `bpf`, and CAP_NET_ADMIN. (To take the link down loses
routes and IPv6 addresses, and programs are told at once; many kernels come without `netem`; packets
that a firewall drops on their way out are an error to who sends them.)
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from mpidl.errors import InvalidArgument, MpidlError
from mpidl.testing.faults import Moment, Rank, Step, check, check_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

SIOCGIFFLAGS, IFF_UP, IFF_LOOPBACK = 0x8913, 0x1, 0x8  # of linux/sockios.h and linux/if.h
TAKE, PASS = 4, 0xFFFFFFFF  # TC_ACT_STOLEN and TC_ACT_UNSPEC, of linux/pkt_cls.h
PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
HINTS = {
    "not permitted": " (it takes root, or a container with --cap-add NET_ADMIN)",
    "not found": " (tc comes with iproute2)",
}
# Arguments: HANDLE VERDICT SECONDS INTERFACES...; without SECONDS, for good. Returns when they are
# cut. What heals them is nobody's child, in a session of its own, and does so too when asked to
# end. Of several cuts at once the last removes the qdisc, unless others have filters there.
SCRIPT = """
handle=$1 verdict=$2 seconds=$3
shift 3
add() {
    tc filter add dev "$1" "$2" pref 1 handle "$handle" bpf da bytecode "1,6 0 0 $verdict"
}
cut() {
    tc qdisc add dev "$1" clsact 2> /dev/null # it may be there
    add "$1" ingress && add "$1" egress
}
heal() {
    for name; do
        for way in ingress egress; do
            tc filter del dev "$name" $way pref 1 handle "$handle" bpf
        done
        left=$(tc filter show dev "$name" ingress; tc filter show dev "$name" egress)
        [ -n "$left" ] || tc qdisc del dev "$name" clsact
    done > /dev/null 2>&1
}
for name; do
    for try in 1 2 3 last; do # another one may remove the qdisc
        said=$(cut "$name" 2>&1) && break
        heal "$name"
        [ $try != last ] || { echo "$name: $said"; heal "$@"; exit 1; }
    done
done
case $seconds in
    "") exit 0 ;;
    0) heal "$@"; exit 0 ;;
esac
(
    trap exit HUP INT TERM
    trap 'heal "$@"; kill $sleeping' EXIT
    sleep "$seconds" &
    sleeping=$!
    wait $sleeping
) > /dev/null 2>&1 < /dev/null &
"""


@final
@dataclass(frozen=True)
class Cut:
    """The link of the rank's host is cut for so many `seconds`; None for good.

    Of all its network interfaces but loopback, or of `interface` alone. Ranks of one host still
    reach each other; what passes the kernel by (InfiniBand's verbs) is not cut. It heals after that
    time even where the rank has died, but not where all processes of the job are killed with
    SIGKILL, sleeping ones in sessions of their own too, as `scancel -s KILL` may do.
    """

    rank: Rank = None
    step: Step = 0
    seconds: float | None = 5.0
    interface: str | None = None
    moment: Moment = "before"
    once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self)
        check_seconds(self, self.seconds)
        if self.interface is not None and not (isinstance(self.interface, str) and self.interface):
            raise InvalidArgument(f"{self}: expected the name of a network interface, or None")

    def act(self, replica: Any, rng: Any, seconds: float) -> None:
        """Return when it is cut. Raises MpidlError where that fails."""
        said = self._run(TAKE, "" if self.seconds is None else f"{self.seconds:f}", links(self))
        if said:
            raise MpidlError(f"{self}: {said}")

    def after(self, delay: float) -> Callable[[], None]:
        """Let it happen after `delay` seconds. Returns how to prevent it."""
        timer = threading.Timer(delay, self.act, (None, None, 0.0))
        timer.daemon = True
        timer.start()
        return timer.cancel

    def try_out(self) -> None:
        """Put filters there that let all pass, and take them away. Raises InvalidArgument."""
        if said := self._run(PASS, "0", links(self)):
            hint = next((hint for sign, hint in HINTS.items() if sign in said), "")
            host = socket.gethostname()
            raise InvalidArgument(f"{self} cannot be on {host}: {said}{hint}")

    def _run(self, verdict: int, seconds: str, names: list[str]) -> str:
        """Return what went wrong."""
        handle = str(1 + secrets.randbelow(2**31 - 1))
        line = ["/bin/sh", "-c", SCRIPT, "mpidl-cut", handle, str(verdict), seconds, *names]
        done = subprocess.run(
            line,
            env={"PATH": PATHS, "LC_ALL": "C"},  # and no mark of the job: it outlives that
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            start_new_session=True,
            check=False,
        )
        said = (done.stdout + done.stderr).strip().splitlines()
        return "; ".join(said or ["tc fails"]) if done.returncode else ""


def links(cut: Cut) -> list[str]:
    """Return the interfaces to be cut. Raises InvalidArgument where there is none."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode())
            flags = struct.unpack("H", fcntl.ioctl(any_socket, SIOCGIFFLAGS, asked)[16:18])[0]
            if flags & IFF_UP and not flags & IFF_LOOPBACK:
                found.append(name)
    if cut.interface is None and found:
        return found
    if cut.interface in found:
        return [cut.interface]
    known = ", ".join(found) or "none"
    host = socket.gethostname()
    raise InvalidArgument(f"{cut} cannot be on {host}: its links that are up, but lo: {known}")
