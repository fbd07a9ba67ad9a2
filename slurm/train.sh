#!/usr/bin/env bash
# Train under Slurm; from the folder that holds slurm/:  sbatch slurm/train.sh [KEY=VALUE ...]
#
# Edit these lines. Options given to sbatch override them: sbatch --nodes=2 slurm/train.sh strategy=horovod
#SBATCH --job-name=mnist_dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1        # processes on each node for strategy=horovod: one per GPU
#SBATCH --cpus-per-task=2          # cores for each of them
##SBATCH --gpus-per-node=1         # remove one # to use GPUs
#SBATCH --time=01:00:00
#SBATCH --output=runs/job-%j.log   # below the folder from which sbatch was called
#SBATCH --open-mode=append         # a requeued job appends to the same file
#SBATCH --signal=SIGUSR2@90        # the processes are warned 90 s before the time is up
#SBATCH --requeue                  # the job may be requeued
# A job that was stopped on request (preemption, the time is nearly up) or lost a process is requeued, and resumes from
# its last checkpoint; but at most this many times from the same checkpoint. 0: never.
max_requeues=5
set -euo pipefail

script=slurm/train.sh
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: this is a batch script: sbatch $script [KEY=VALUE ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source-path=SCRIPTDIR/.. source=slurm/common.sh
source slurm/common.sh # the site, how many processes, and the number of the job
[[ -n $run_dir ]] || arguments+=("run_dir=${run_dir:=runs/job-$id}")

# --- go -----------------------------------------------------------------------

echo "Job $id on $SLURM_JOB_NODELIST: $nodes node(s), $per_node process(es) on each with $per_task core(s)," \
    "$gpus GPU(s) on each, restarted ${SLURM_RESTART_COUNT:-0} time(s)"

run_step -m mnist_dist.train "${arguments[@]}"
((code != 0)) || exit 0
find_reason
checkpoints=("${run_dir//[\"\']/}"/checkpoints/epoch-*.ckpt)
checkpoint="no checkpoint"
[[ ! -e ${checkpoints[-1]} ]] || checkpoint=${checkpoints[-1]##*/}
put_back "$checkpoint" "resume from $checkpoint"
