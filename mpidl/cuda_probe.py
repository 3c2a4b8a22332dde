"""Run by `cuda_aware.measure`, alone: gives MPI pointers to GPU memory. It may crash there.

Prints "mpidl: yes", or "mpidl: " and the reason why not.
"""

from __future__ import annotations

from typing import Any

SIZES = (1, 1 << 12, 1 << 20)  # float32: short messages go another way than long ones


def main() -> None:
    """Try, and tell."""
    print(f"mpidl: {verdict()}", flush=True)


def verdict() -> str:
    """Return "yes", or why MPI cannot be given GPU memory here."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own error class lives in the module that may be broken
        return f"no GPU: {error}"
    if count == 0:
        return "no GPU: none is visible"
    from mpidl import mpi
    from mpidl.errors import MpidlError

    try:
        MPI = mpi.load()
        mpi.start(MPI)
    except MpidlError as error:
        return f"no MPI: {error}"
    return trial(MPI, cupy)


def trial(MPI: Any, cupy: Any) -> str:
    """Return "yes" if messages and sums of GPU memory come to GPU memory as they should."""
    comm = MPI.COMM_SELF
    for size in SIZES:
        sent = cupy.arange(size, dtype="f4")
        came, total = cupy.zeros(size, "f4"), cupy.zeros(size, "f4")
        cupy.cuda.get_current_stream().synchronize()  # MPI does not know streams
        try:
            comm.Sendrecv(sent, 0, 0, came, 0, 0)
            comm.Allreduce(sent, total)
            comm.Allreduce(MPI.IN_PLACE, sent)
        except (MPI.Exception, BufferError, TypeError, ValueError) as error:
            return f"MPI refuses GPU memory: {error}"
        expected = cupy.arange(size, dtype="f4")
        for name, found in (("a message", came), ("a sum", total), ("a sum in place", sent)):
            if not bool((found == expected).all()):
                return f"{name} of {size} float32 in GPU memory came out wrong"
    return "yes"


if __name__ == "__main__":
    main()
