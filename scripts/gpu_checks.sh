#!/usr/bin/env bash
# Measures on a GPU host what no CPU can tell, the most telling first. FOLDER/summary.txt is written anew after each
# step, so that an interrupted run leaves what it has measured.
#
# usage: scripts/gpu_checks.sh [FOLDER]                      (default: runs/gpu_DATE_TIME)
#
#   1. the recipe with the default settings, twice: seconds of training (aim: 150 epochs in 3 s), what `auto` chose, bits
#   2. bits: two runs of `single`, one of `mirrored` and one of Horovod, exact and fast, with and without XLA
#   3. for each precision one benchmark of all of these, Keras and the bare products, in turns: seconds an epoch, and
#      the accuracy after EPOCHS epochs
#
# Environment: PYTHON (.venv/bin/python), DATA ("data=auto"), RECIPE_EPOCHS (150), EPOCHS (20; at least 3),
#   PRECISIONS ("mixed_bfloat16 float32 mixed_float16")
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
folder=${1:-runs/gpu_$(date +%Y%m%d_%H%M%S)}
epochs=${EPOCHS:-20}
read -ra data <<<"${DATA:-data=auto}"
read -ra precisions <<<"${PRECISIONS:-mixed_bfloat16 float32 mixed_float16}"
# For a Python that the package is not installed in.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# By default a process takes all memory of a GPU, and here several share it.
export TF_FORCE_GPU_ALLOW_GROWTH=true

command -v "$python" >/dev/null || { echo "no such Python: $python; run make setup, or set PYTHON" >&2; exit 2; }
((epochs >= 3)) || { echo "EPOCHS=$epochs: at least 3, since two only warm up" >&2; exit 2; }
mkdir -p "$folder"

step() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
summarize() { "$python" scripts/gpu_summary.py "$folder" >"$folder/summary.txt"; }

# train GROUP/NAME KEY=VALUE ...: never fails; the summary shows the last line of a run that did.
train() {
    local run=$folder/runs/$1
    mkdir -p "$(dirname "$run")"
    timeout 300 "$python" -m mnist_dist.train "${data[@]}" run_dir="$run" "${@:2}" >"$run.log" 2>&1 || true
}

# Of the contenders on standard input, those that the package accepts, as a list; the others go to refused.txt.
accepted() {
    "$python" -c '
import json, sys
from mnist_dist.base.errors import UserError
from mnist_dist.benchmark.entries import parse
good = []
for text in sys.stdin.read().splitlines():
    try:
        good.append(parse(text).text)
    except UserError as error:
        print("refused:", error, file=sys.stderr)
print(json.dumps(good))' 2>>"$folder/refused.txt"
}

for number in 1 2; do
    step "the recipe, run $number"
    train "default/run-$number" trainer.epochs="${RECIPE_EPOCHS:-150}"
done
summarize

for mode in {exact,fast}" compile="{none,xla}; do
    step "bits: $mode"
    for run in single-1 single-2 mirrored horovod; do # at once, since only their bits count
        # shellcheck disable=SC2086  # two keys
        train "${mode/ compile=/-}/$run" strategy="${run%-*}" trainer.epochs="$epochs" reproducibility=$mode &
    done
    wait
done
summarize

for precision in "${precisions[@]}"; do
    step "benchmark: $precision"
    contenders=$(printf "%s precision=$precision\n" \
        "strategy="{single,mirrored,"horovod processes=1"}" reproducibility="{exact,fast}" compile="{none,xla} \
        keras "keras steps_per_execution=epoch jit_compile="{false,true} floor | accepted)
    "$python" -m mnist_dist.benchmark "${data[@]}" run_dir="$folder/$precision" "contenders=$contenders" \
        startup.enabled=false warmup_epochs=2 epochs=$((epochs - 2)) >"$folder/$precision.log" 2>&1 ||
        step "failed: $folder/$precision.log"
    summarize
done
step "done: $folder/summary.txt"
cat "$folder/summary.txt"
