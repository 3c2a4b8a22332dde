"""Memory that all ranks of a node map."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mpidl.errors import NoSharedMemory

if TYPE_CHECKING:
    from mpidl.world import World

MFD_CLOEXEC = 1  # of linux/memfd.h
ADVICE = "let all ranks of a node run as one user, in one container (PID namespace)"


def allocate(world: World, size: int) -> mmap.mmap:
    """Return `size` zeroed bytes that all ranks of this node read and write. Collective.

    An anonymous file (memfd_create(2)), which the other ranks open through /proc/PID/fd. It has no
    name, so that nothing is left of it when the ranks are gone, in whatever way they go; it does
    not count against the size of /dev/shm; and it outlives the rank that made it. The kernel gives
    a page the memory of the NUMA node that first writes to it. The memory is given back when no
    rank has an array in it any more.

    Raises NoSharedMemory on every rank of the world where any rank cannot map it.
    """
    made, problem = None, None
    if world.local_rank == 0:
        try:
            made = _create(size)
        except (AttributeError, OSError) as error:  # a C library may lack the function
            problem = f"memfd_create: {error}"
    name = world.local.bcast(None if made is None else _name(made))
    memory = None
    if name is not None:
        try:
            memory = _open(name, size)
        except OSError as error:
            problem = f"cannot map {size} bytes of process {name[0]} on the same node: {error}"
    try:
        world.agree(NoSharedMemory(problem) if problem else None)  # the others have opened it
    finally:
        if made is not None:
            os.close(made)
    assert memory is not None
    return memory


def _create(size: int) -> int:
    """Return the descriptor of a new anonymous file. Raises OSError; AttributeError without it."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("mpidl")
    else:  # some builds of Python are for older C libraries than the one that is here
        file = ctypes.CDLL(None, use_errno=True).memfd_create(b"mpidl", MFD_CLOEXEC)
        if file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        os.ftruncate(file, size)
    except OSError:
        os.close(file)
        raise
    return file


def _name(file: int) -> tuple[int, int, int, int]:
    """Return where to find an open file: process, descriptor; device and inode, to know it by."""
    state = os.fstat(file)
    return os.getpid(), file, state.st_dev, state.st_ino


def _open(name: tuple[int, int, int, int], size: int) -> mmap.mmap:
    """Map an open file of a process. Raises OSError, also where it is another file."""
    process, descriptor, *same = name
    path = Path(f"/proc/{process}/fd/{descriptor}")
    try:
        state = path.stat()  # another process of that number may have anything open there
        if [state.st_dev, state.st_ino] != same:
            raise OSError(errno.ESRCH, "that number is another process here")
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {ADVICE}") from error
    try:
        return mmap.mmap(file, size)
    finally:
        os.close(file)
