"""The curves of a run, drawn from the lines of its log.

Needs matplotlib, which training itself does not.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PANELS = {
    "loss": {"train_loss": "train", "test_loss": "val", "ema_test_loss": "val, EMA"},
    "top-1 on val (%)": {"test_acc1": "val", "ema_test_acc1": "val, EMA"},
    "learning rate": {"train_lr": ""},
}


def plot(axis: "Axes", log: Sequence[dict], key: str, name: str | None = None, **style) -> "Line2D":
    """Draw a number of each epoch that has it."""
    points = [(epoch["epoch"], epoch[key]) for epoch in log if epoch.get(key) is not None]
    axis.xaxis.get_major_locator().set_params(integer=True)
    return axis.plot(*zip(*points) if points else ((), ()), label=name, **style)[0]


def tidy(axis: "Axes") -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw(log: Sequence[dict], title: str) -> "Figure":
    """Return a figure of losses, accuracy and learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    for axis, (name, keys) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        drawn = [plot(axis, log, key, label, marker="o", ms=3) for key, label in keys.items() if key in log[-1]]
        axis.set(title=name, xlabel="epoch")
        tidy(axis)
        if len(drawn) > 1:
            axis.legend(frameon=False)
    return figure
