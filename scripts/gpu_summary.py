"""What `gpu_checks.sh` has found so far: `python scripts/gpu_summary.py FOLDER` prints it."""

import csv
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from mnist_dist.benchmark.machine import describe_machine
from mnist_dist.benchmark.report import format_table


def describe_run(folder: Path) -> str:
    """What `auto` chose, seconds of training, accuracy and digest; of a failed run, the last line of its output."""
    if not (folder / "summary.json").exists():
        return (folder.parent / f"{folder.name}.log").read_text(errors="replace").strip().rpartition("\n")[2]
    summary = json.loads((folder / "summary.json").read_text())
    seconds = [float(row["epoch_s"]) for row in csv.DictReader((folder / "history.csv").read_text().splitlines())]
    chosen = [summary[key] for key in ("strategy", "precision", "reproducibility")]
    chosen.append("compile " + OmegaConf.load(folder / "config.yaml").compile)
    accuracies = [f"{summary[split]['accuracy']:.4f} {split}" for split in ("val", "test")]
    return (
        f"{' '.join(chosen)}: {len(seconds)} epochs in {sum(seconds):.2f} s (the first in {seconds[0]:.2f} s), "
        f"accuracy {' '.join(accuracies)}, {summary['weights_sha256'][:12]}"
    )


folder = Path(sys.argv[1])
machine = describe_machine()
print(f"{machine['cpu']}, {machine['cores']} cores; GPUs: {', '.join(machine['gpus']) or 'none'}")
for log in sorted(folder.glob("runs/*/*.log")):
    print(f"{log.parent.name}, {log.stem}: {describe_run(log.with_suffix(''))}")
rows = [row for report in folder.glob("*/benchmark.json") for row in json.loads(report.read_text())["rows"]]
print(*format_table(rows), sep="\n")
print(*[f"failed: {row['contender']}: {row['error']}" for row in rows if row["status"] != "ok"], sep="\n")
if (folder / "refused.txt").exists():
    print((folder / "refused.txt").read_text())
