"""Valid arguments of what trains and keeps states in mpidl.torch: on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

import mpidl.torch as hvd
from mpidl.torch.optimizer import _live
from mpidl.torch.parallel import DataParallel
from tests.fuzz.calls import Given, given, on
from tests.fuzz.tables.torch import HOSTILE as HOSTILE
from tests.fuzz.tensors import leaf, nn, of_two_params

DATA = torch.utils.data.TensorDataset(torch.ones(6, 3), torch.arange(6) % 2)


def batch_norm(**options: Any) -> Any:
    return hvd.SyncBatchNorm(3, **options)


def replica(**options: Any) -> Any:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    return DataParallel(model, optimizer, "allreduce", **options)


def on_replica(method: Callable[[Any], Given], **options: Any) -> Given:
    made = replica(**options)
    return method(made)._replace(close=made.close)


def one() -> Given:
    model = nn.Linear(3, 2)
    return given(
        model, torch.optim.SGD(model.parameters(), 0.1), "allreduce", None, by_element=None,
        batch_dim=0, broadcast_buffers=True, overlap="auto", bucket_bytes="auto",
        microbatches=None, noise_every=1,
    )._replace(then=train)  # fmt: skip


def train(made: Any) -> None:
    try:
        if isinstance(made.module, nn.Linear):
            made(torch.ones(2, 3)).sum().backward()
    finally:
        made.close()


def distributed(**options: Any) -> Any:
    _live.clear()  # or the next one looks for a name that none of them has
    return hvd.DistributedOptimizer(of_two_params(), **options)


def optimizer() -> Given:
    model = nn.Linear(3, 2)
    return given(
        torch.optim.SGD(model.parameters(), 0.1), list(model.named_parameters()),
        hvd.Compression.none, 1, hvd.Average, 1.0, 0, [[model.weight], [model.bias]], False,
        hvd.global_process_set,
    )._replace(then=lambda made: made.step())  # fmt: skip


def checkpointed() -> Given:
    model = nn.Linear(3, 2)
    return given(model, torch.optim.SGD(model.parameters(), 0.1), None, other=sampler())._replace(
        then=lambda made: (made.tensors(), made.held(), made.numbers())
    )


def sampler() -> Any:
    return hvd.Sampler(DATA, 2)


def loader() -> Any:
    return hvd.loader(DATA, 2)


def elastic_sampler() -> Any:
    return hvd.elastic.ElasticSampler(DATA)


def state_of(made: Any, **changes: Any) -> dict[str, Any]:
    return {**made.state_dict(), **changes}


def ended(made: Any) -> Any:
    """Save a state, and go back."""
    made.save()
    made.restore()
    made.sync()


def looped(state: Any) -> Given:
    return given(lambda s: s)._replace(callbacks=(0,), then=lambda run: run(state))


#: Of a state, one key at a time is replaced.
STATE: Mapping[str, Any] = MappingProxyType({"epoch": 0, "processed_num": 2})


TABLE: dict[str, Callable[[], Given]] = {
    "torch.adasum:AdasumSteps.set_backward_passes_per_step": lambda: on(
        distributed(op=hvd.Adasum), 2
    ),
    "torch.adasum:AdasumSteps.step": lambda: on(distributed(op=hvd.Adasum), lambda: 1.0)._replace(
        theirs=(1,)
    ),
    "torch.checkpointed:Checkpointed": checkpointed,
    "torch.elastic:ObjectState": lambda: given(epoch=1, batch=[1])._replace(then=ended),
    "torch.elastic:TorchState": lambda: given(
        nn.Linear(3, 2), of_two_params(), sampler=elastic_sampler(), epoch=1
    )._replace(then=ended),
    "torch.elastic:run": lambda: looped(hvd.elastic.ObjectState(epoch=1)),
    "torch.elastic_sampler:ElasticSampler": lambda: given(DATA, True, 0)._replace(then=list),
    "torch.elastic_sampler:ElasticSampler.load_state_dict": lambda: on(
        elastic_sampler(), dict(STATE)
    ),
    "torch.elastic_sampler:ElasticSampler.record_batch": lambda: on(elastic_sampler(), 0, 2),
    "torch.elastic_sampler:ElasticSampler.set_epoch": lambda: on(elastic_sampler(), 1),
    "torch.optimizer:DistributedOptimizer": optimizer,
    "torch.optimizer:_Averaged.add_param_group": lambda: on(
        distributed(), {"params": [leaf(2)], "lr": 0.1}
    )._replace(theirs=(1,)),
    "torch.optimizer:_Averaged.set_backward_passes_per_step": lambda: on(distributed(), 2),
    "torch.optimizer:_Averaged.step": lambda: on(distributed(), lambda: 1.0)._replace(
        callbacks=(1,)
    ),
    "torch.optimizer:_Averaged.zero_grad": lambda: on(distributed(), True),
    "torch.parallel:DataParallel": one,
    "torch.parallel:DataParallel.average_gradients": lambda: on_replica(lambda made: on(made, 1.0)),
    "torch.parallel:DataParallel.forward": lambda: on_replica(
        lambda made: on(made, torch.ones(2, 3))._replace(theirs=(1,))
    ),
    "torch.parallel:DataParallel.join": lambda: on_replica(
        lambda made: on(made, lambda: None)._replace(callbacks=(1,))
    ),
    "torch.parallel:DataParallel.load_state_dict": lambda: on_replica(
        lambda made: on(made, dict(nn.Linear(3, 2).state_dict()))
    ),
    "torch.parallel:DataParallel.split": lambda: on_replica(
        lambda made: on(made, torch.ones(4, 3), torch.ones(4, 2)), microbatches=2
    ),
    "torch.sampler:Loader.epochs": lambda: on(loader(), 3),
    "torch.sampler:Loader.load_state_dict": lambda: on(loader(), state_of(loader()))._replace(
        then=None
    ),
    "torch.sampler:Loader.set_epoch": lambda: on(loader(), 3),
    "torch.sampler:Sampler": lambda: given(DATA, 2, shuffle=True, seed=0, microbatches=2)._replace(
        then=list
    ),
    "torch.sampler:Sampler.load_state_dict": lambda: on(sampler(), state_of(sampler())),
    "torch.sampler:Sampler.set_epoch": lambda: on(sampler(), 3),
    "torch.sampler:loader": lambda: given(
        DATA, 2, shuffle=True, seed=0, microbatches=2, collate_fn=None
    )._replace(then=list, callbacks=("collate_fn",)),
    "torch.sync_batch_norm:SyncBatchNorm": lambda: given(3, 1e-5, 0.1, True, True, "cpu")._replace(
        then=lambda made: made(torch.ones(2, made.num_features))
    ),
    "torch.sync_batch_norm:SyncBatchNorm.convert_sync_batchnorm": lambda: given(
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ),
    "torch.sync_batch_norm:SyncBatchNorm.forward": lambda: on(batch_norm(), torch.ones(2, 3)),
}
