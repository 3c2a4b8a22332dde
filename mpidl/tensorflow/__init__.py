"""mpidl for TensorFlow 2: means over ranks, in `tf.function` and outside; names as in Horovod's.

For Keras models and `fit` there is `mpidl.keras`.
"""

from mpidl.tensorflow.average import average
from mpidl.tensorflow.tape import DistributedGradientTape
from mpidl.tensorflow.variables import broadcast_variables
from mpidl.world import current, init

__all__ = [
    "DistributedGradientTape",
    "average",
    "broadcast_variables",
    "init",
    "local_rank",
    "local_size",
    "rank",
    "size",
]


def rank() -> int:
    """Return the number of this rank, from 0 on. Collective at the first call, as `init`."""
    return current().rank


def size() -> int:
    """Return the number of ranks."""
    return current().size


def local_rank() -> int:
    """Return the number of this rank among those of its node."""
    return current().local_rank


def local_size() -> int:
    """Return the number of ranks on this node."""
    return current().local_size
