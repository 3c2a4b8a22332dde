"""Every error mpidl raises on purpose. Each says what it saw, what it expected and what to do."""

from __future__ import annotations


class MpidlError(Exception):
    """The base of all errors below."""

    #: True where `World.agree` raised it, so that every rank is known to have raised the same.
    collective = False


class InvalidArgument(MpidlError, ValueError):
    """A value that cannot be: a negative rate, a batch of 0, an unknown environment setting."""


class MPINotFound(MpidlError):
    """mpi4py is missing, or it finds no MPI library to load."""


class LauncherMismatch(MpidlError):
    """The ranks were started by a launcher of another MPI, so each believes it is alone."""


class DeviceNotFound(MpidlError):
    """A GPU was asked for where there is no CuPy or no GPU."""


class RankMismatch(MpidlError):
    """The ranks do not agree: on parameters, on a strategy, on the length of a data set."""


class UnknownStrategy(MpidlError):
    """No strategy of this name is registered."""


class NoSharedMemory(MpidlError):
    """The ranks of a node cannot map each other's memory."""


class NoPeerAccess(NoSharedMemory):
    """The ranks of a node cannot map each other's GPU memory."""


class OutOfDeviceMemory(MpidlError, MemoryError):
    """A GPU has not as much free memory as was asked for. The message names what it was for."""


class UnsupportedDtype(MpidlError):
    """An array of a dtype that MPI cannot sum."""


class BatchTooLarge(MpidlError):
    """The global batch is larger than the data set."""


class MissingBackward(MpidlError):
    """A step was asked for, but a rank has no gradient."""


class NonFinite(MpidlError):
    """A parameter, or the loss, is NaN or infinity."""


class NonFiniteGradient(NonFinite):
    """A gradient holds NaN or infinity."""


class AutogradError(MpidlError):
    """An operation got shapes, dtypes or labels it cannot use, or backward cannot run."""


class GradientMismatch(MpidlError):
    """A gradient differs from the numeric one."""


class WorkerFailed(MpidlError):
    """A worker of a loader raised an error, or was killed."""


class DataError(MpidlError):
    """A data file that is missing, cut short, or not what its name says."""


class CheckpointError(MpidlError):
    """A checkpoint that is missing, damaged, or another model's. The message names the file."""
