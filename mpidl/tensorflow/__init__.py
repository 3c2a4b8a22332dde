"""mpidl for TensorFlow 2: means over ranks, in `tf.function` and outside; names as in Horovod's.

For Keras models and `fit` there is `mpidl.keras`.
"""

from mpidl.tensorflow.average import average
from mpidl.tensorflow.tape import DistributedGradientTape
from mpidl.tensorflow.variables import broadcast_variables
from mpidl.world import init, local_rank, local_size, rank, size

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
