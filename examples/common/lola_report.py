"""Table, claims and figure of the LOLA example."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from common.command import Estimate, estimate
from common.lola_learning import is_forgiving, is_tit_for_tat
from common.prisoners_dilemma import STATES, TIT_FOR_TAT, forgiveness_limit
from common.reporting import Table, save_figure


COLOURS = ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
COOPERATION = -1.1  # a mean reward for a step above which a pair counts as cooperating
#: Of the LOLA paper, exact; half the 95 % interval follows from its deviation, 0.19, over 50 runs.
PAPER_REWARD, PAPER_HALF, PAPER_SHARE = -1.06, 0.05, 0.81
Rows = list[dict[str, Any]]


def last_tenth(rows: Rows) -> Tensor:
    """Return each pair's mean reward for a step over the last tenth of the iterations."""
    since = 0.9 * rows[-1]["iteration"]
    return torch.tensor([row["returns"] for row in rows if row["iteration"] > since]).mean(0)


def title(part: dict[str, Any]) -> str:
    """Return what names a part of the run, in words."""
    return f"{part['gradients']}, {look_aheads(part['look_aheads'])}"


def look_aheads(number: int) -> str:
    """Return the number of look-aheads in words."""
    return "naive" if number == 0 else f"{number} look-ahead{'s' if number > 1 else ''}"


def summary(parts: list[tuple[dict[str, Any], Rows]]) -> tuple[Table, list[dict[str, Any]]]:
    """Return the table of all parts, and the same numbers for ``results.json``."""
    end = parts[0][1][-1]["iteration"]
    table = Table(
        title=f"After {end} iterations", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for name in ("learners", "step sizes"):
        table.add_column(name, no_wrap=True)
    for name in ("pairs", "reward of a step", "lowest", "tit-for-tat"):
        table.add_column(name, justify="right", no_wrap=True)
    numbers = [{**part, **_numbers(rows)} for part, rows in parts]
    for row in numbers:
        share = f"{100 * row['tit_for_tat']:.0f} %"
        names = (title(row), row["steps"], str(row["pairs"]))
        table.add_row(*names, _reward_text(row), f"{row['lowest']:.3f}", share)
    return table, numbers


def _numbers(rows: Rows) -> dict[str, Any]:
    each, policies = last_tenth(rows), torch.tensor(rows[-1]["policies"])
    mean = estimate(each.tolist())
    return {
        "pairs": len(each),
        "reward": mean.mean,
        "half_width": mean.half_width,
        "lowest": each.min().item(),
        "best_mean_before": max(fmean(row["returns"]) for row in rows),
        "cooperating_pairs": (each > COOPERATION).double().mean().item(),
        "tit_for_tat": is_tit_for_tat(policies).double().mean().item(),
        "forgiving": is_forgiving(policies).double().mean().item(),
        "policy": policies.mean((0, 1)).tolist(),
    }


def _reward_text(row: dict[str, Any]) -> str:
    return f"{Estimate(row['reward'], row['half_width'], row['pairs']):.3f}"


def claims(numbers: list[dict[str, Any]], iterations: int, steps: str) -> list[dict[str, Any]]:
    """Compare what the papers claim with what came out; ``steps`` names the main step sizes."""
    main = [row for row in numbers if row["steps"] == steps]
    naive = [row for row in main if row["look_aheads"] == 0]
    result = []
    if naive:
        holds = all(row["reward"] < -1.9 for row in naive)
        result.append(_claim("naive learners defect: about -2 a step", naive, holds))
    for gradients in ("exact", "DiCE"):
        shaping = [r for r in main if r["gradients"] == gradients and r["look_aheads"] > 0]
        if shaping:
            what = f"LOLA ({gradients}) cooperates and still does after {iterations} iterations"
            holds = all(row["reward"] > COOPERATION for row in shaping)
            share = min(row["cooperating_pairs"] for row in shaping)
            more = f"; at least {100 * share:.0f} % of the pairs above {COOPERATION}"
            result.append(_claim(f"{what}: about -1 a step", shaping, holds, more))
            holds = all(row["tit_for_tat"] > 0.5 for row in shaping)
            shares = (f"{title(r)}: {100 * r['tit_for_tat']:.0f} %" for r in shaping)
            what = f"LOLA ({gradients}): most players learn tit-for-tat"
            result.append({"claim": what, "measured": "; ".join(shares), "holds": holds})
    for row in numbers:
        if row["steps"] == "LOLA paper" and row["look_aheads"] == 1:
            both = math.hypot(row["half_width"], PAPER_HALF)  # nan for a single pair
            holds = None if math.isnan(both) else abs(row["reward"] - PAPER_REWARD) < both
            what = f"settings of the LOLA paper: {PAPER_REWARD} ± {PAPER_HALF} a step"
            result.append(_claim(what, [row], holds))
            share, more = row["tit_for_tat"], row["forgiving"]
            measured = f"{100 * share:.0f} % of the players, and {100 * more:.0f} % that also "
            measured += "cooperate after CD"
            what = f"settings of the LOLA paper: tit-for-tat {100 * PAPER_SHARE:.0f} %"
            result.append(
                {"claim": what, "measured": measured, "holds": share >= PAPER_SHARE - 0.1}
            )
    for row in numbers:
        if (
            row["steps"] == "TorchOpt 0.7"
            and row["gradients"] == "exact"
            and row["look_aheads"] == 1
        ):
            best = row["best_mean_before"]
            what = "the one-step run of TorchOpt 0.7 collapses; its steps do with exact gradients"
            holds = best > COOPERATION > row["reward"]
            result.append(_claim(what, [row], holds, f", after {best:.3f} at best"))
    return result


def _claim(
    what: str, rows: list[dict[str, Any]], holds: bool | None, more: str = ""
) -> dict[str, Any]:
    each = "; ".join(f"{title(row)}: {_reward_text(row)}" for row in rows)
    return {"claim": what, "measured": each + more, "holds": holds}


# Figure -------------------------------------------------------------------------------------------


def draw(path: Path, parts: list[tuple[dict[str, Any], Rows]], discount: float, steps: str) -> None:
    """Draw rewards over the iterations, the final policies, and why cooperation may end.

    Args:
        path: The PNG file.
        parts: What names a part of the run, and its rows.
        discount: Discount factor of the game.
        steps: Names the main step sizes.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
    main = [(part, rows) for part, rows in parts if part["steps"] == steps]
    for place, gradients in ((axes[0, 0], "exact"), (axes[0, 1], "DiCE")):
        chosen = [(part, rows) for part, rows in main if part["gradients"] == gradients]
        if not chosen:
            place.set_axis_off()
            continue
        _rewards(place, chosen)
        title = "exact gradients" if gradients == "exact" else "sampled games, DiCE"
        pairs = len(chosen[0][1][0]["returns"])
        place.set_title(f"{title}: mean of {pairs} pairs, 95 % interval", fontsize=10)
    _policies(axes[1, 0], main)
    why = [
        rows for part, rows in parts if part["steps"] == "TorchOpt 0.7" and part["look_aheads"] == 1
    ]
    if why:
        _collapse(axes[1, 1], why[0], discount)
    else:
        axes[1, 1].set_axis_off()
    save_figure(figure, path, dpi=100)
    plt.close(figure)


def _rewards(axes: Any, parts: list[tuple[dict[str, Any], Rows]]) -> None:
    for part, rows in parts:
        iterations = [row["iteration"] for row in rows]
        estimates = [estimate(row["returns"]) for row in rows]
        mean = torch.tensor([e.mean for e in estimates])
        half = torch.tensor([e.half_width for e in estimates])
        colour = COLOURS[part["look_aheads"] % len(COLOURS)]
        label = look_aheads(part["look_aheads"]) if part["look_aheads"] else "naive learners (0)"
        number = part["look_aheads"]
        width = max(1.2, 5.5 - 1.5 * number) if number else 1.4  # lines may lie upon each other
        axes.plot(iterations, mean, color=colour, label=label, linewidth=width)
        # no pair can leave the range between the rewards for mutual defection and cooperation
        low, high = (mean - half).clamp_min(-2.0), (mean + half).clamp_max(-1.0)
        axes.fill_between(iterations, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xlabel="iteration", ylabel="mean reward of a step", ylim=(-2.06, -0.94))
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", fontsize=9)


def _policies(axes: Any, parts: list[tuple[dict[str, Any], Rows]]) -> None:
    places = range(len(STATES))
    axes.bar(places, TIT_FOR_TAT, color="0.9", width=0.9, label="tit-for-tat")
    axes.plot([-0.45, 4.45], [0, 0], color="0.7", linewidth=0.8)
    width = 0.8 / max(1, len(parts))
    for index, (part, rows) in enumerate(parts):
        policies = torch.tensor(rows[-1]["policies"]).flatten(0, 1)
        at = [place - 0.4 + (index + 0.5) * width for place in places]
        colour = COLOURS[part["look_aheads"] % len(COLOURS)]
        exact = part["gradients"] == "exact"
        for x, column in zip(at, policies.T):
            axes.plot([x] * len(column), column, ".", color=colour, alpha=0.25, markersize=4)
        face = colour if exact else "white"
        axes.plot(at, policies.mean(0), "o" if exact else "s", color=colour, mfc=face, markersize=6)
    axes.plot([], [], "o", color="0.3", label="exact, mean of players")
    axes.plot([], [], "s", color="0.3", mfc="white", label="DiCE, mean of players")
    axes.plot([], [], ".", color="0.3", alpha=0.5, label="one player")
    axes.set_xticks(list(places), ["first round", *(f"after {state}" for state in STATES[1:])])
    axes.set(ylabel="probability to cooperate", ylim=(-0.05, 1.36))
    axes.set_title("policies at the end, colours as above", fontsize=10)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(loc="upper center", ncols=2, fontsize=8)


def _collapse(axes: Any, rows: Rows, discount: float) -> None:
    """Show the pair that lost most: who forgives, and who exploits it."""
    iterations = [row["iteration"] for row in rows]
    returns = torch.tensor([row["returns"] for row in rows])
    pair = int((returns.max(0).values - returns[-1]).argmax())
    policies = torch.tensor([row["policies"][pair] for row in rows])  # [rows, 2, 5]
    limit = forgiveness_limit(discount)
    over = (policies[:, :, 2] > limit).double().argmax(0)  # the row in which each crosses it, or 0
    over[policies[:, :, 2].amax(0) <= limit] = len(rows)
    first = int(over.argmin())
    for label, values, colour in (
        ("A cooperates after CD (forgives)", policies[:, first, 2], "tab:red"),
        ("B cooperates after CC", policies[:, 1 - first, 1], "tab:blue"),
        ("B cooperates after CD", policies[:, 1 - first, 2], "tab:cyan"),
    ):
        axes.plot(iterations, values, color=colour, label=label, linewidth=1.4)
    label = f"{limit:.2f}: defecting against A pays above"
    axes.axhline(limit, color="tab:red", linestyle="--", linewidth=1, label=label)
    axes.set_title(
        "why the steps of TorchOpt 0.7 fail: the pair that lost most, exact", fontsize=10
    )
    axes.set(xlabel="iteration", ylabel="probability", ylim=(-0.05, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", fontsize=8)
