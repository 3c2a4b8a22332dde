"""One run of a trial: trains a model as the first argument says, and leaves what it came to.

Every rank appends "TIME STEPS SIZE" to FOLDER/steps-RANK after each update: the monotonic clock,
which all processes of a host share, the updates made and the ranks there are. At the end it writes
FOLDER/end-RANK.json. RANK is its number at the start of the job. SIGUSR2 lets it write its stacks
to FOLDER/stack-RANK. What it has in the node's memory stands in FOLDER/memory-RANK: nobody may
leave it there.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import mpidl
from mpidl import data, nn, optim
from mpidl.testing import faults_from_environment, inject

SAMPLES, FEATURES, CLASSES = 1797, 64, 10  # as the digits of scikit-learn
OPTIMIZERS = {
    "sgd": lambda: optim.SGD(0.05, momentum=0.9),
    "adam": lambda: optim.Adam(1e-3),
}


def main(asked: dict[str, Any], folder: Path) -> None:
    if asked["torch"]:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from tests.chaos import train_torch  # PyTorch takes long to import

        train_torch.main(asked, folder)
        return
    world = mpidl.init()
    rank = world.MPI.COMM_WORLD.rank
    faulthandler.register(signal.SIGUSR2, (folder / f"stack-{rank}").open("w"), all_threads=True)
    dtype = "float32" if asked["microbatches"] else "float64"  # there, rounding shows little
    rng = np.random.default_rng(asked["seed"])
    samples = data.ArrayDataset(
        rng.standard_normal((SAMPLES, FEATURES), np.float32).astype(dtype),
        rng.integers(0, CLASSES, SAMPLES),
    )
    nn.seed(asked["seed"])
    model = make_model(asked["dropout"], asked["batch_norm"], dtype)

    def loss(output: mpidl.Tensor, target: Any) -> mpidl.Tensor:
        if asked["pace"] and model.training:  # seconds a step is to take
            parts = trainer.replica.microbatches
            time.sleep(asked["pace"] / (1 if parts is None else len(parts.mine)))
        return nn.cross_entropy(output, target)

    options: dict[str, Any] = {}
    if asked["how"] == "elastic":
        options["elastic"] = True
    every = asked["checkpoint_every"]
    if every is not None or asked["how"] == "restarts":
        options.update(checkpoint=folder / "run", checkpoint_every=every or 5)
    trainer = mpidl.Trainer(
        model,
        loss,
        OPTIMIZERS[asked["optimizer"]](),
        asked["strategy"],
        microbatches=asked["microbatches"],
        clip_norm=asked["clip_norm"],
        quiet=True,
        **options,
    )
    tell_steps(folder / f"steps-{rank}")
    (folder / f"memory-{rank}").write_text("\n".join(memory(trainer)))
    plan = faults_from_environment()
    faults = inject(trainer, *plan.faults, seed=plan.seed, record=plan.record)
    faults.__enter__()  # until the process ends: they may come in its last moments, too
    dies = asked["in_recovery"]
    if asked["how"] == "elastic" and dies is not None and dies["rank"] == rank:
        die_in_recovery(dies["call"], folder / "faults/99.json", rank)
    train: Any = samples
    fit: dict[str, Any] = {"batch_size": asked["batch_size"], "seed": asked["seed"]}
    if asked["workers"] is not None:
        fit.update(world=world, workers=asked["workers"], microbatches=asked["microbatches"])
        train, fit = data.Loader(samples, **fit), {}
    test = samples if asked["evaluate"] else None
    history = trainer.fit(train, asked["epochs"], evaluate=test, **fit)
    state = model.state_dict()
    stored = state
    if "checkpoint" in options:  # the last one is complete when `fit` returns
        other = make_model(asked["dropout"], asked["batch_norm"], dtype)
        stored = mpidl.load(folder / "run", other).state_dict()
    told = {
        "steps": trainer.replica.steps,
        "epochs": [[epoch.epoch, epoch.steps] for epoch in history],
        "losses": [[epoch.loss, *epoch.metrics.values()] for epoch in history],
        "weights": digest(state),
        "stored": digest(stored),
        "size": trainer.world.size,
    }
    trainer.close()
    np.savez(folder / f"weights-{rank}.npz", **state)
    (folder / f"end-{rank}.json").write_text(json.dumps(told))


def make_model(dropout: float, batch_norm: bool, dtype: str) -> nn.Module:
    norm = [nn.BatchNorm1d(128)] if batch_norm else []
    model = nn.Sequential(
        *(nn.Linear(FEATURES, 128), *norm, nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


def digest(state: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for value in state.values():
        found.update(value.tobytes())
    return found.hexdigest()


def memory(trainer: mpidl.Trainer) -> list[str]:
    """Return the paths under /dev/shm that this rank knows of."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split(maxsplit=5)[5] for line in lines if " /dev/shm/" in line}
    elastic = getattr(trainer, "_elastic", None)
    if elastic is not None:
        found.add(str(elastic.folder))
    return sorted(path for path in found if not path.endswith(" (deleted)"))


def die_in_recovery(call: int, record: Path, rank: int) -> None:
    """Be killed at one of the first calls of the world that is left: the others recover, too."""
    from mpi4py import MPI

    calls = 0

    class Dying(MPI.Intracomm):
        def __getattribute__(self, name: str) -> Any:
            nonlocal calls
            calls += 1
            if calls > call:
                told = {"fault": f"Kill in recovery before {name}", "rank": rank, "step": -1}
                record.parent.mkdir(exist_ok=True)
                record.write_text(json.dumps({**told, "time": time.monotonic()}))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getattribute__(name)

    plain = mpidl.World.of
    mpidl.World.of = lambda module, comm, **known: plain(  # type: ignore[method-assign]
        module, Dying(comm), **known
    )


def tell_steps(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    plain = mpidl.DataParallel.step

    def step(replica: mpidl.DataParallel, weight: float | None = None) -> None:
        before = replica.steps
        plain(replica, weight)
        if replica.steps != before:
            os.write(file, f"{time.monotonic()} {replica.steps} {replica.world.size}\n".encode())

    mpidl.DataParallel.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
