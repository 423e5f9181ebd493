"""Draw ``docs/convergence.json``: ``python docs/convergence_picture.py``."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from convergence import DATA, PROBLEMS, SETTINGS, made, optimizers, recorded, takes_curvature


PICTURE = Path(__file__).parent / "images" / "convergence.png"

#: Where the axis begins.
LEFT = 0.7

#: Families in the order of the picture; :func:`family` tells which an optimizer is of.
PLAIN = "the gradient, its average"
SIGNS = "signs"
ENTRIES = "a scale for each entry"
TENSORS = "whole tensors"
FREE = "no learning rate to choose"
MORE = "more than one gradient a step"
FAMILIES = (PLAIN, SIGNS, ENTRIES, TENSORS, FREE, MORE)


def family(name: str) -> str:
    """Return the family of an optimizer, found by what it does with a few gradients."""
    if "lr" in SETTINGS.get(name, {}) and name != "LBFGS":
        return FREE
    if _calls_twice(name):
        return MORE
    moved = _moved(name)
    if not torch.allclose(moved[0, 0], _moved(name, seed=2)[0, 0], rtol=1e-6):
        return TENSORS
    if (moved - moved[0, 0]).abs().max() < 1e-6 * moved.abs().max():
        return SIGNS
    return PLAIN if (_moved(name, scale=100.0) / moved).mean() > 50 else ENTRIES


def _calls_twice(name: str) -> bool:
    calls = 0
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer: Any = made(name, [weight], 1e-3)

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = weight.square().sum()
        (weight.grad,) = torch.autograd.grad(loss, weight)
        return loss

    optimizer.step(closure)
    return calls > 1 or takes_curvature(optimizer)


def _moved(name: str, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    """Return how far positive gradients move a matrix, once averages have warmed up.

    ``seed`` is that of the gradients of all entries but the first one.
    """
    weight = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer: Any = made(name, [weight], 1e-4)
    before = weight.detach().clone()
    first, others = (torch.Generator().manual_seed(s) for s in (0, seed))
    for step in range(24):
        if step == 12:
            before = weight.detach().clone()
        grad = torch.rand(2, 2, generator=others, dtype=torch.float64)
        grad[0, 0] = torch.rand((), generator=first, dtype=torch.float64)
        weight.grad = scale * (0.2 + grad)
        optimizer.step()
    return weight.detach() - before


def _rows(data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the families and their optimizers, those with the fewest gradients first."""
    families = {name: family(name) for name in optimizers() if name in data}

    def effort(name: str) -> float:
        return sum(
            math.log(data[name][key].get("reached", 2 * problem.budget))
            for key, problem in PROBLEMS.items()
        )

    return [
        (title, sorted((n for n, f in families.items() if f == title), key=effort))
        for title in FAMILIES
    ]


def draw(path: Path = PICTURE) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    data = recorded()
    groups = _rows(data)
    places: dict[str, float] = {}
    titles: dict[str, float] = {}
    at = 0.0
    for title, names in groups:
        titles[title] = at
        at += 1.0
        for name in names:
            places[name], at = at, at + 1.0
        at += 0.35
    figure, axes = pyplot.subplots(
        1, 3, figsize=(11, 0.235 * at + 1.3), sharey=True, gridspec_kw={"wspace": 0.09}
    )
    for ax, (key, problem) in zip(axes, PROBLEMS.items()):
        norm = LogNorm(problem.tolerance, data["SGD"][key]["losses"][0])
        image: Any = None
        for name, place in places.items():
            image = _strip(ax, data[name][key], place, problem, norm)
        _axis(ax, problem, at)
        bar = figure.colorbar(image, ax=ax, orientation="horizontal", pad=0.045, aspect=28)
        bar.set_label("loss", fontsize=8, labelpad=1)
        bar.ax.tick_params(labelsize=7.5)
    axes[0].set_yticks(list(places.values()), list(places), fontsize=8.5)
    for title, place in titles.items():
        axes[0].text(
            *(-0.02, place, title), transform=axes[0].get_yaxis_transform(), ha="right",
            va="center", fontsize=8.5, color="#0b5d7a", fontweight="bold",
        )  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    digest = hashlib.sha256(DATA.read_bytes()).hexdigest()  # so that a test sees what it is of
    figure.savefig(
        path, dpi=125, bbox_inches="tight", pad_inches=0.1, metadata={"Description": digest}
    )
    pyplot.close(figure)


def _strip(ax: Any, row: dict[str, Any], place: float, problem: Any, norm: Any) -> Any:
    """Draw the loss of one run as colours along its gradients, and write how many they were."""
    reached = row.get("reached")
    count = len(row["losses"]) if reached is None else row["gradients"].index(reached) + 1
    edges = [LEFT, *row["gradients"][1:count]]  # the axis has no place for 0 gradients
    losses = [min(x, norm.vmax) if math.isfinite(x) else norm.vmax for x in row["losses"]]
    ends, colours = [place - 0.4, place + 0.4], [losses[: count - 1]]
    image = ax.pcolormesh(edges, ends, colours, cmap="viridis_r", norm=norm, shading="flat")
    text, style = str(reached), {"fontsize": 7.5, "color": "#222222"}
    if reached is None:
        last = row["losses"][-1]
        text = f"{last:.2g}" if last < row["losses"][0] else "diverged"
        style = {"fontsize": 7, "color": "#b3261e", "style": "italic"}
    ax.text(edges[-1] * 1.06, place, text, va="center", **style)
    rate = f"{row['lr']:g}"
    ax.text(1.0, place, f"{rate} ", transform=ax.get_yaxis_transform(), va="center", ha="right",
            fontsize=6.5, color="#777")  # fmt: skip
    return image


def _axis(ax: Any, problem: Any, height: float) -> None:
    ax.set_xscale("log")
    ax.set_xlim(LEFT, problem.budget * 10)
    ax.set_ylim(height - 0.4, -0.8)
    ticks = [x for x in (1, 10, 100, 1000) if x <= problem.budget]
    ax.set_xticks(ticks, [str(x) for x in ticks], fontsize=8)
    ax.minorticks_off()
    ax.tick_params(axis="y", length=0)
    ax.set_title(f"{problem.title}: loss ≤ {problem.tolerance:g}", fontsize=10)
    ax.set_xlabel("gradients computed", fontsize=8, labelpad=1)
    ax.text(1.0, -0.1, "lr ", transform=ax.get_yaxis_transform(), va="center", ha="right",
            fontsize=7, color="#777")  # fmt: skip
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


if __name__ == "__main__":
    draw()
