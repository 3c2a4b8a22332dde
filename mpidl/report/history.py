"""`plot_history`: what `Trainer.fit` returned, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpidl.errors import InvalidArgument, MpidlError
from mpidl.refuse import refuses, told
from mpidl.report import style
from mpidl.report.drawing import finite, logarithmic, plot

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpidl.history import Epoch


@refuses
def plot_history(history: Sequence[Epoch], file: str | Path | None = None) -> Any:
    """Draw loss, metrics and samples a second of a training, over its epochs.

    Call it on one rank. The figure is not that of pyplot: a notebook shows it where a cell ends
    with it.

    Args:
        history: as `Trainer.fit` returns it.
        file: where to save it, too: .png, .svg, .pdf, or what else matplotlib writes.

    Returns:
        The `matplotlib.figure.Figure`: a panel for the loss, one for each metric, and one for the
        throughput.

    Raises:
        InvalidArgument: `history` holds no epochs, or `file` has another ending.
        MpidlError: matplotlib is not installed, or `file` cannot be written.

    Example::

        mpidl.plot_history(trainer.fit(train, epochs=10, batch_size=256), "history.png")
    """
    from mpidl.history import Epoch

    good = isinstance(history, (list, tuple)) and all(isinstance(e, Epoch) for e in history)
    if not good or not history:
        raise InvalidArgument(f"history: {told(history)}: expected what Trainer.fit returns")
    x = [e.epoch for e in history]
    metrics = {name: None for e in history for name in e.metrics if name != "loss"}
    with style.styled():
        figure, panels = style.figure(2 + len(metrics), 4.5, 3.4, squeeze=False)
        first, *others, last = panels[0]
        losses = [e.loss for e in history]
        tests = [e.metrics.get("loss", float("nan")) for e in history]
        plot(first, x, losses, **style.look(0), label="training")
        if finite(tests):
            plot(first, x, tests, **style.look(1), linestyle="--", label="test")
            first.legend()
        logarithmic(first, [*losses, *tests])
        for panel, name in zip(others, metrics, strict=True):
            plot(panel, x, [e.metrics.get(name, float("nan")) for e in history], **style.look(0))
            panel.set_ylabel(f"test {name}", parse_math=False)
        plot(last, x, [e.samples_per_second for e in history], **style.look(0))
        last.set_ylim(bottom=0)
        style.counts(last.yaxis)
        first.set_ylabel("loss")
        last.set_ylabel("samples / s")
        for panel in panels[0]:
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
        if file is not None:
            try:
                figure.savefig(file)
            except OSError as error:
                raise MpidlError(f"cannot write {told(file, form=str)}: {error}") from error
    return figure
