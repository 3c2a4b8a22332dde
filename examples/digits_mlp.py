"""Teach a small network to read handwritten digits, on any number of ranks.

mpidl run -n 2 examples/digits_mlp.py --strategy ring

Expect 97.5 % to 98.6 % on digits never trained on, after 3 s on 2 ranks.
"""

import options

import mpidl
from mpidl import data, nn, optim


def main() -> None:
    parser = options.parser(__doc__, epochs=30, batch_size=64)
    parser.add_argument(
        "--microbatches",
        type=int,
        help="parts of a batch: for the same bits on any number of ranks",
    )
    parser.add_argument("--checkpoint", metavar="RUN", help="folder to write to and go on from")
    args = parser.parse_args()
    world = mpidl.init()
    nn.seed(args.seed)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    train, test = data.digits()
    trainer = mpidl.Trainer(
        model.to(args.device),
        nn.cross_entropy,
        optim.SGD(lr=0.1, momentum=0.9),
        strategy=args.strategy,
        microbatches=args.microbatches,
        checkpoint=args.checkpoint,
        out=args.out,
        settings=vars(args),
    )
    history = trainer.fit(train, args.epochs, args.batch_size, evaluate=test, seed=args.seed)
    if world.rank == 0:
        last = history[-1]
        rates = sorted(epoch.samples_per_second for epoch in history)
        print(f"strategy       {trainer.replica.choice.name}")
        print(f"speed          {rates[len(rates) // 2]:,.0f} samples/s on {world.size} ranks")
        print(
            f"test accuracy  {last.metrics['accuracy']:.2%} on {len(test)} digits never trained on"
        )


if __name__ == "__main__":
    main()
