"""One rank's variables, on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from mpidl import packed
from mpidl.world import current

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpidl.array import Array


@tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
def broadcast_variables(variables: Iterable[Any], root_rank: int = 0) -> None:
    """Give all ranks rank `root_rank`'s values of variables, of TensorFlow or Keras. Collective.

    In a `tf.function` too. Raises on every rank InvalidArgument for a root that is no rank,
    RankMismatch where roots, shapes or dtypes differ.
    """
    variables = list(variables)
    tensors = [tf.convert_to_tensor(variable) for variable in variables]
    world = current() if tf.executing_eagerly() else packed.callback_world()

    def on_host(*arrays: Array) -> list[Array]:
        named = {f"variable {i}": np.asarray(array) for i, array in enumerate(arrays)}
        return packed.broadcast(named, root_rank, world)

    if tf.executing_eagerly():
        values = on_host(*(tensor.numpy() for tensor in tensors))
    else:
        values = tf.numpy_function(on_host, tensors, [tensor.dtype for tensor in tensors])
        for value, tensor in zip(values, tensors, strict=True):
            value.set_shape(tensor.shape)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
