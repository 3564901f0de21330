"""The settings of a run over its steps, as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from ssd.planning.facts import Curve, Facts


def draw_schedules(facts: Facts, path: str | Path) -> None:
    """A panel for each setting that moves, temperatures in one, with the steps below and the epochs above. As PNG."""
    panels = panels_of(facts)
    rows = -(-len(panels) // 2)
    figure, places = plt.subplots(rows, 2, figsize=(9, 2.6 * rows), layout="constrained", squeeze=False)
    for axes, (title, curves) in zip(places.flat, panels.items(), strict=False):
        for name, curve in curves.items():
            axes.plot(curve.steps, curve.values, label=name)
        axes.set(title=title, xlabel="step", xlim=(0, max(facts.steps - 1, 1)))
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
        epochs = axes.secondary_xaxis(
            "top", functions=(lambda step: step / facts.steps_per_epoch, lambda epoch: epoch * facts.steps_per_epoch)
        )
        epochs.tick_params(labelsize="small")
        epochs.set_xlabel("epoch", fontsize="small")
    for axes in places.flat[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def panels_of(facts: Facts) -> dict[str, dict[str, Curve]]:
    """Title of a panel -> the settings in it."""
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in facts.curves.items():
        title = "temperature" if name.endswith("temperature") else name
        panels.setdefault(title, {})[name] = curve
    return panels
