"""One run of a trial that trains a PyTorch model; it leaves what `train` does.

`train.main` calls this. Under mpidl.torch.elastic ranks go on from the last commit; with "restarts"
a job goes on from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import mpidl.torch as hvd
from mpidl import checkpoint
from mpidl.checkpoint.folder import complete
from mpidl.errors import CheckpointError
from mpidl.testing import faults_from_environment, inject
from mpidl.world import current
from tests.chaos import train

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
}


class Steps:
    """What `inject` stands around: the steps that are made from one recovery to the next."""

    def __init__(self, state: Any, asked: dict[str, Any], file: int) -> None:
        self.state, self.asked, self.file = state, asked, file
        self.strategy = state.model.strategy
        self.update = SimpleNamespace(strategy=self.strategy)
        self.world = state.model.world

    @property
    def steps(self) -> int:
        return int(self.state.steps)

    def step(self, inputs: Any, targets: Any) -> None:
        state, model = self.state, self.state.model
        losses = []
        for x, y in model.split(inputs, targets):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item() * len(x))
            time.sleep(self.asked["pace"] / max(1, len(model._loop.sums.mine)))
        if self.asked["clip_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.asked["clip_norm"])
        state.optimizer.step()
        state.schedule.step()
        found = model.world.gather(losses)
        state.sums.setdefault(state.batches.epoch, []).append(math.fsum(chain(*found)))
        state.steps += 1
        told = f"{time.monotonic()} {state.steps} {model.world.size}\n"
        os.write(self.file, told.encode())


def main(asked: dict[str, Any], folder: Path) -> None:
    hvd.init()
    world = current()
    rank = world.MPI.COMM_WORLD.rank
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2, (folder / f"stack-{rank}").open("w"), all_threads=True)
    torch.manual_seed(asked["seed"])
    samples = torch.utils.data.TensorDataset(
        torch.randn(train.SAMPLES, train.FEATURES),
        torch.randint(0, train.CLASSES, (train.SAMPLES,)),
    )
    module = make_model(asked["dropout"], asked["batch_norm"])
    optimizer = OPTIMIZERS[asked["optimizer"]](module.parameters())
    model = hvd.DataParallel(
        module, optimizer, asked["strategy"], microbatches=asked["microbatches"]
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9)
    batches = hvd.loader(
        samples, asked["batch_size"], seed=asked["seed"], microbatches=asked["microbatches"]
    )
    state = hvd.elastic.TorchState(
        model, optimizer, schedule=schedule, batches=batches, steps=0, sums={}
    )
    every = asked["checkpoint_every"] or (5 if asked["how"] == "restarts" else None)
    keeps = hvd.Checkpointed(model, optimizer, schedule, batches=batches)
    if asked["how"] == "restarts":
        try:
            loaded = checkpoint.load(keeps, folder / "run", fallback=True)
            state.steps = loaded.step
            state.sums = {int(epoch): sums for epoch, sums in loaded.extra["sums"].items()}
        except CheckpointError:  # there is none yet
            pass
    path = folder / f"steps-{rank}"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    target = SimpleNamespace(world=world, replica=Steps(state, asked, file))
    (folder / f"memory-{rank}").write_text("\n".join(train.memory(model)))
    plan = faults_from_environment()
    faults = inject(target, *plan.faults, seed=plan.seed, record=plan.record)  # type: ignore[arg-type]
    faults.__enter__()  # until the process ends: they may come in its last moments, too
    dies = asked["in_recovery"]
    if asked["how"] == "elastic" and dies is not None and dies["rank"] == rank:
        train.die_in_recovery(dies["call"], folder / "faults/99.json", rank)

    def save() -> None:
        extra = {"sums": {str(epoch): sums for epoch, sums in state.sums.items()}}
        checkpoint.save(keeps, folder / "run", step=state.steps, extra=extra)

    @hvd.elastic.run
    def fit(state: Any) -> None:
        target.replica = Steps(state, asked, file)
        for _ in state.batches.epochs(asked["epochs"]):
            for inputs, targets in state.batches:
                target.replica.step(inputs, targets)
                if state.steps % asked["commit_every"] == 0:
                    state.commit()
                if every is not None and state.steps % every == 0:
                    save()
        if every is not None:
            save()

    fit(state)
    found = {name: value.numpy() for name, value in module.state_dict().items()}
    stored = found
    if every is not None:
        newest = checkpoint.weights(complete(folder / "run")[0])
        stored = {name: newest[name] for name in found}
    told = {
        "steps": state.steps,
        "epochs": [[epoch, len(sums)] for epoch, sums in state.sums.items()],
        "losses": [math.fsum(sums) / train.SAMPLES for sums in state.sums.values()],
        "weights": train.digest(found),
        "stored": train.digest(stored),
        "size": hvd.size(),
    }
    np.savez(folder / f"weights-{rank}.npz", **found)
    (folder / f"end-{rank}.json").write_text(json.dumps(told))


def make_model(dropout: float, batch_norm: bool) -> Any:
    nn = torch.nn
    norm = [nn.BatchNorm1d(128)] if batch_norm else []
    return nn.Sequential(
        *(nn.Linear(train.FEATURES, 128), *norm, nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, train.CLASSES)),
    )
