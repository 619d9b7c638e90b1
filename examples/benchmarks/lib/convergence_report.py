"""What the runs of convergence.py say: tables in Markdown, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.bench import markdown_table, mean, subplots
from lib.convergence_job import METHODS, RESPONSES, SCENARIOS, SYNCHRONOUS, fault_steps

Run = dict[str, Any]


def runs_of(results: dict[str, Any], scenario: str, method: str) -> list[Run]:
    """In the order of their seeds."""
    found = [run for run in results["runs"] if run["scenario"] == scenario and run["method"] == method]
    return sorted(found, key=lambda run: int(run["seed"]))


def present(results: dict[str, Any]) -> dict[str, list[str]]:
    """The scenarios that have runs, and the methods that each has."""
    found = {scenario: [method for method in METHODS if runs_of(results, scenario, method)] for scenario in SCENARIOS}
    return {scenario: methods for scenario, methods in found.items() if methods}


def excess(runs: Sequence[Run], reference: Sequence[Run]) -> float | None:
    """How much larger the loss is than the reference's: the mean of the seeds that both have; None without one.

    >>> excess([{"seed": 0, "loss": 2.2}, {"seed": 1, "loss": 9.0}], [{"seed": 0, "loss": 2.0}])
    0.10000000000000009
    """
    losses = {run["seed"]: run["loss"] for run in reference}
    ratios = [run["loss"] / losses[run["seed"]] for run in runs if run["seed"] in losses]
    return statistics.fmean(ratios) - 1 if ratios else None


def after_fault(runs: Sequence[Run], last_faulty_step: int) -> list[Run]:
    """The runs, their loss being the first one that was evaluated after `last_faulty_step` had been taken."""
    found = []
    for run in runs:
        later = [loss for step, loss in run["evaluations"] if step >= last_faulty_step]
        found += [{**run, "loss": later[0]}] if later else []
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """One table a scenario."""
    parts = [
        f"**{scenario}**: {SCENARIOS[scenario]}\n\n{scenario_table(results, scenario)}" for scenario in present(results)
    ]
    return "\n\n".join(parts)


def scenario_table(results: dict[str, Any], scenario: str) -> str:
    heading = ["method", "validation loss", "seeds", "spread", "over sync"]
    if scenario != "clean":
        heading += ["right after", "over its clean run there", "over it at the end"]
    heading += ["tokens", "seconds", "syncs", "clipped units", "effective replicas", "left out"]
    return markdown_table(heading, [row(results, scenario, method) for method in present(results)[scenario]])


def row(results: dict[str, Any], scenario: str, method: str) -> list[str]:
    runs = runs_of(results, scenario, method)
    losses = [run["loss"] for run in runs]
    cells = [method, f"{mean(losses):.4f}", str(len(runs)), f"{max(losses) - min(losses):.4f}"]
    cells.append(percent(excess(runs, runs_of(results, scenario, "sync"))))
    if scenario != "clean":
        settings = results["settings"]
        last = settings["fault_first"] * settings["steps"]
        last += fault_steps(scenario, settings["fault_steps"], settings["spike_steps"])
        clean = runs_of(results, "clean", "edit" if method in RESPONSES else method)
        after, clean_after = after_fault(runs, int(last)), after_fault(clean, int(last))
        cells.append(f"{mean([run['loss'] for run in after]):.4f}" if after else "")
        cells += [percent(excess(after, clean_after)), percent(excess(runs, clean))]
    cells.append(f"{mean([run['tokens'] for run in runs]):,.0f}")
    cells.append(f"{mean([run['train_seconds'] for run in runs]):.0f}")
    if method in SYNCHRONOUS:
        return [*cells, "", "", "", ""]
    cells.append(f"{mean([run['syncs'] for run in runs]):.0f}")
    cells.append(f"{mean([run['clipped_share'] for run in runs]):.1%}")
    cells.append(f"{mean([run['effective_replicas'] for run in runs]):.2f}")
    cells.append(f"{mean([run['anomalous_replicas'] for run in runs]):.1f}")
    return cells


def percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{share:+.{digits}%}"


# -- plot -------------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any], path: Path) -> None:
    """For each scenario the validation loss on the way, and at the end."""
    found = present(results)
    figure, axes = subplots(len(found), 2)
    for number, (scenario, methods) in enumerate(found.items()):
        draw_curves(axes[2 * number], results, scenario, methods)
        draw_ends(axes[2 * number + 1], results, scenario, methods)
    figure.savefig(path, dpi=150)


def colour(method: str) -> str:
    return f"C{list(METHODS).index(method)}"


def draw_curves(axis: Any, results: dict[str, Any], scenario: str, methods: Sequence[str]) -> None:
    for method in methods:
        runs = runs_of(results, scenario, method)
        points: dict[int, list[float]] = {}
        for run in runs:
            for step, loss in run["evaluations"]:
                points.setdefault(step, []).append(loss)
        steps = sorted(step for step, losses in points.items() if len(losses) == len(runs))
        axis.plot(steps, [mean(points[step]) for step in steps], color=colour(method), label=method, linewidth=1.3)
    axis.set(title=f"{scenario}: {SCENARIOS[scenario]}", xlabel="step", ylabel="validation loss (nats a byte)")
    axis.legend(frameon=False, fontsize="small")


def draw_ends(axis: Any, results: dict[str, Any], scenario: str, methods: Sequence[str]) -> None:
    everything: list[float] = []
    for place, method in enumerate(methods):
        losses = [run["loss"] for run in runs_of(results, scenario, method)]
        axis.bar(place, mean(losses), color=colour(method), alpha=0.5)
        axis.plot([place] * len(losses), losses, "k.", markersize=4)
        everything += losses
    margin = 0.3 * (max(everything) - min(everything)) or 0.1
    axis.set_ylim(min(everything) - margin, max(everything) + margin)
    axis.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize="small")
    axis.set(title="at the end; a dot is a seed", ylabel="validation loss (nats a byte)")
