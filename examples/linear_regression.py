"""Foretell how diabetes will progress from ten measurements: linear regression.

mpidl run -n 2 examples/linear_regression.py

A batch is the whole data set, so that SGD ends at the least squares solution: expect an R^2 of
0.52 on patients never trained on, after 3 s. Features are scaled by their means and deviations over
the samples of all ranks; each weight is the progress that goes with one deviation.
"""

import options

import mpidl
from mpidl import data, nn, optim


def main() -> None:
    args = options.parse(__doc__, epochs=300, batch_size=354)
    world = mpidl.init()
    nn.seed(args.seed)
    train, test = data.diabetes()
    scaler = data.StandardScaler.fit(train, world=world)
    model = nn.Linear(10, 1)
    trainer = mpidl.Trainer(
        model.to(args.device),
        nn.mse,
        optim.SGD(lr=0.3, momentum=0.9),
        strategy=args.strategy,
        out=args.out,
        settings=vars(args),
        quiet=True,
    )
    trainer.fit(scaler.apply(train), args.epochs, args.batch_size, seed=args.seed)
    error = trainer.evaluate(scaler.apply(test))["loss"]
    if world.rank == 0:
        state, fit = model.state_dict(), 1 - error / test.y.var()
        print(f"strategy       {trainer.replica.choice.name}")
        print(f"weights        {' '.join(f'{w:.4f}' for w in state['weight'][0])}")
        print(f"mean           {state['bias'][0]:.4f}")
        print(f"test R^2       {fit:.4f} on {len(test)} patients never trained on")


if __name__ == "__main__":
    main()
