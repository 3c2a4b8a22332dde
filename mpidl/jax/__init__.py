"""mpidl for JAX: means over ranks of pytrees, inside `jax.jit` and outside.

`import mpidl.jax` starts no MPI; the first call does, or `mpidl.init()`.
"""

from mpidl.jax.average import average
from mpidl.jax.broadcast import broadcast
from mpidl.jax.optimizer import data_parallel

__all__ = ["average", "broadcast", "data_parallel"]
