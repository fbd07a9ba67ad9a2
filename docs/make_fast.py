"""Writes the table of docs/fast.md and its picture: `python docs/make_fast.py`, from the repository's root.

What was measured is read from docs/fast_measured.json; `make_fast.py RECIPE FIRST_SEED LAST_SEED KEY=VALUE ...`
trains `experiment=RECIPE` for these seeds, one after the other in one process, and puts the results there.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats

from mnist_dist.results.png import add_grid, to_png

DOCS = Path(__file__).parent
PAGE, MEASURED, PICTURE = DOCS / "fast.md", DOCS / "fast_measured.json", DOCS / "images" / "fast.png"
GOAL = 0.9843  # the original run's validation accuracy after its 150 epochs
COLORS = {"fast": "#0072B2", "original": "#D55E00"}  # Okabe-Ito


def measure(recipe: str, seeds: Sequence[int], overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Train `experiment=recipe` once for each seed; the histories, and the accuracy on the test set."""
    from mnist_dist.config.compose import compose_config
    from mnist_dist.data.load import load_dataset
    from mnist_dist.data.splits import preprocess
    from mnist_dist.engine.build import assemble, start_devices
    from mnist_dist.launch.rendezvous import Rendezvous
    from mnist_dist.launch.topology import Topology

    config = compose_config(f"experiment={recipe}", "strategy=single", "data=mnist", *overrides)
    splits = preprocess(
        load_dataset(config.data), val_fraction=config.data.val_fraction, split_seed=config.data.split_seed
    )
    config, strategy = start_devices(config, Rendezvous(Topology(), timeout_s=1), num_gpus=0)
    runs = []
    for seed in seeds:
        engine = assemble(replace(config, seed=seed), strategy, splits, topology=Topology())
        rows = engine.create_trainer().fit(num_epochs=config.trainer.epochs).epochs
        sums, _ = engine.evaluate()
        runs.append(
            {
                "seed": seed,
                "val_accuracy": [row.val_accuracy for row in rows],
                "epoch_s": [round(row.epoch_s, 4) for row in rows],
                "test_accuracy": sums["test"].metrics().accuracy,
            }
        )
        print(
            recipe, seed, *(f"{runs[-1]['val_accuracy'][-1]:.4f} {runs[-1]['test_accuracy']:.4f}".split()), flush=True
        )
    return runs


def epochs_to_goal(run: dict[str, Any]) -> int | None:
    """The first epoch with the goal's validation accuracy; None if there is none."""
    return next((epoch for epoch, value in enumerate(run["val_accuracy"], start=1) if value >= GOAL), None)


def interval(values: Sequence[float]) -> str:
    """The mean with the 95 % interval of the mean by Student's t, and the smallest value."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{np.mean(values):.4f} ± {half:.4f}, at least {min(values):.4f}"


def table(measured: dict[str, list[dict[str, Any]]]) -> str:
    """The table as Markdown."""
    names = list(measured)
    rows: dict[str, list[str]] = {key: [] for key in ("seeds", "epochs", "val", "test", "to", "first", "seconds")}
    for name in names:
        runs = measured[name]
        firsts = [epochs_to_goal(run) for run in runs]
        found = [(run, first) for run, first in zip(runs, firsts, strict=True) if first]
        seconds = [sum(run["epoch_s"][:first]) for run, first in found]
        rows["seeds"].append(f"{len(runs)}, from {runs[0]['seed']} to {runs[-1]['seed']}")
        rows["epochs"].append(str(len(runs[0]["val_accuracy"])))
        rows["val"].append(interval([run["val_accuracy"][-1] for run in runs]))
        rows["test"].append(interval([run["test_accuracy"] for run in runs]))
        rows["to"].append(f"{len(found)} of {len(runs)}")
        numbers = sorted(first for _, first in found)
        rows["first"].append(f"{numbers[len(numbers) // 2]} ({numbers[0]} to {numbers[-1]})" if found else "never")
        rows["seconds"].append(f"{np.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})" if found else "")
    words = {
        "seeds": "seeds",
        "epochs": "epochs trained",
        "val": "validation accuracy after the last one",
        "test": "test accuracy after the last one",
        "to": f"seeds that reach {GOAL} on validation",
        "first": "first epoch there: median (range)",
        "seconds": "seconds of training until there: median (range)",
    }
    lines = [f"| | {' | '.join(f'`experiment={name}`' for name in names)} |", f"| --- |{' --- |' * len(names)}"]
    return "\n".join([*lines, *(f"| {words[key]} | {' | '.join(values)} |" for key, values in rows.items())])


def draw(measured: dict[str, list[dict[str, Any]]]) -> Figure:
    """Validation accuracy of all seeds against the epoch, on a logarithmic axis."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, runs in measured.items():
        values = np.array([run["val_accuracy"] for run in runs])
        epochs = np.arange(1, values.shape[1] + 1)
        axes.plot(epochs, values.T, color=COLORS[name], alpha=0.12, linewidth=0.7)
        axes.plot(
            epochs, values.mean(axis=0), color=COLORS[name], label=f"experiment={name}: mean of {len(runs)} seeds"
        )
    axes.axhline(GOAL, color="#555555", linestyle="--", linewidth=0.8)
    axes.annotate(
        f"{GOAL}: the original run after 150 epochs", (11, GOAL), (0, 3), textcoords="offset points", fontsize=8
    )
    axes.set(xscale="log", xlabel="epoch", ylabel="validation accuracy", ylim=(0.95, 0.99), xlim=(1, 150))
    axes.set_xticks(
        [1, 2, 5, 10, 20, 50, 100, 150], labels=["1", "2", "5", "10", "20", "50", "100", "150"], minor=False
    )
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    add_grid(axes)
    axes.legend(loc="lower right", frameon=False)
    return figure


def main() -> None:
    """Measure, if asked to, and write page and picture."""
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    if len(sys.argv) > 1:
        recipe, first, last, *overrides = sys.argv[1:]
        measured[recipe] = measure(recipe, range(int(first), int(last) + 1), overrides)
        MEASURED.write_text(json.dumps(measured, separators=(",", ":")) + "\n")
    PICTURE.write_bytes(to_png(lambda: draw(measured)))
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    PAGE.write_text(f"{before}<!-- table -->\n\n{table(measured)}\n\n<!-- end of table -->{after}")


if __name__ == "__main__":
    main()
