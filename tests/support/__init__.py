"""What the tests share: jobs to start, kill and inspect, launchers, hooks, data, a Slurm cluster."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
