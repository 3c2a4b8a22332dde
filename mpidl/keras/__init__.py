"""mpidl for Keras 3, on its backends JAX, PyTorch and TensorFlow; names as in horovod.keras.

```python
import mpidl.keras as hvd

hvd.init()
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1 * hvd.size())), loss="mse")
model.fit(x[hvd.rank() :: hvd.size()], y[hvd.rank() :: hvd.size()], callbacks=[
    hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()])
```

All ranks must make the same number of steps. The mean over ranks is that over all samples where
their batches are of one size.
"""

from mpidl.keras import callbacks
from mpidl.keras.callbacks import (
    BroadcastGlobalVariablesCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
    on_rank_0,
)
from mpidl.keras.optimizer import DistributedOptimizer, load_model
from mpidl.world import init, local_rank, local_size, rank, size

__all__ = [
    "BroadcastGlobalVariablesCallback",
    "DistributedOptimizer",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "callbacks",
    "init",
    "load_model",
    "local_rank",
    "local_size",
    "on_rank_0",
    "rank",
    "size",
]
