"""PaddlePaddle: its gradients are averaged where they are.

mpidl run -n 2 examples/frameworks/paddle_digits.py
"""

import argparse

import paddle
from paddle.nn import Linear, ReLU, Sequential
from paddle.nn.functional import cross_entropy

import mpidl
from mpidl import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    world = mpidl.init()
    paddle.seed(0)
    model = Sequential(Linear(64, 256), ReLU(), Linear(256, 128), ReLU(), Linear(128, 10))
    parameters = model.parameters()
    mpidl.average(parameters, weight=world.rank == 0)  # all start from what rank 0 drew
    sgd = paddle.optimizer.Momentum(0.1, 0.9, parameters=parameters)
    train, test = data.digits()
    for epoch in range(args.epochs):
        for x, y in data.batches(train, 64, world=world, epoch=epoch):
            loss = cross_entropy(model(paddle.to_tensor(x)), paddle.to_tensor(y))
            loss.backward()
            mpidl.average([p.grad for p in parameters], weight=len(x))
            sgd.step()
            sgd.clear_grad()
    with paddle.no_grad():
        scores = model(paddle.to_tensor(test.x)).numpy()
    accuracy = (scores.argmax(1) == test.y).mean()
    print(f"rank {world.rank}: test accuracy {accuracy:.2%}, sum of scores {abs(scores).sum():.9g}")


if __name__ == "__main__":
    main()
