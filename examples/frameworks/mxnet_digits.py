"""MXNet 1.9: its gradients are averaged where they are.

mpidl run -n 2 examples/frameworks/mxnet_digits.py
"""

import argparse

import numpy as np

import mpidl
from mpidl import data

# MXNet 1.9.1, the last one, asks for names that NumPy 2 no longer has. Functions it only lists: any
# will do.
GONE = "alltrue in1d mirr msort npv pmt ppmt product pv rate round_ sometrue trapz"
INF, NAN = np.inf, np.nan
NUMBERS = {
    "PZERO": 0.0,
    "NZERO": -0.0,
    "PINF": INF,
    "NINF": -INF,
    "Inf": INF,
    "NAN": NAN,
    "NaN": NAN,
}
for name, value in {**dict.fromkeys(GONE.split(), np.all), **NUMBERS}.items():
    if not hasattr(np, name):
        setattr(np, name, value)

import mxnet  # noqa: E402
from mxnet import autograd, gluon, nd  # noqa: E402
from mxnet.gluon.nn import Dense, Sequential  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    world = mpidl.init()
    mxnet.random.seed(0)
    model = Sequential()
    model.add(Dense(256, "relu", in_units=64), Dense(128, "relu", in_units=256))
    model.add(Dense(10, in_units=128))
    model.initialize(mxnet.init.Xavier())
    parameters = list(model.collect_params().values())
    mpidl.average([p.data() for p in parameters], weight=world.rank == 0)  # rank 0's, for all
    sgd = gluon.Trainer(parameters, "sgd", {"learning_rate": 0.1, "momentum": 0.9}, kvstore=None)
    cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()
    train, test = data.digits()
    for epoch in range(args.epochs):
        for x, y in data.batches(train, 64, world=world, epoch=epoch):
            with autograd.record():
                loss = cross_entropy(model(nd.array(x)), nd.array(y)).mean()
            loss.backward()
            mpidl.average([p.grad() for p in parameters], weight=len(x))
            sgd.update(1)
    scores = model(nd.array(test.x)).asnumpy()
    accuracy = (scores.argmax(1) == test.y).mean()
    print(f"rank {world.rank}: test accuracy {accuracy:.2%}, sum of scores {abs(scores).sum():.9g}")


if __name__ == "__main__":
    main()
