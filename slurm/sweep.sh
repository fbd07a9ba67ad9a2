#!/usr/bin/env bash
# Search hyper-parameters under Slurm, as many trials at once as the array has tasks. From the folder that holds slurm/:
#     sbatch --array=0-7 slurm/sweep.sh space=mlp num_trials=40 [KEY=VALUE ...]
# Each task takes trials until all are done; nothing runs on the login node. The same command with the sweep_dir that the
# log names continues a sweep, with any number of tasks.
#
# Edit these lines. Options given to sbatch override them: sbatch --array=0-3 --gpus-per-node=4 slurm/sweep.sh ...
#SBATCH --job-name=mnist_dist_sweep
#SBATCH --nodes=1                  # a task of the array trains on one node
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2          # cores for a trial; with jobs=N for N trials at a time
##SBATCH --gpus-per-node=1         # remove one # to use GPUs
#SBATCH --time=01:00:00
#SBATCH --output=runs/sweep-%A_%a.log # below the folder from which sbatch was called
#SBATCH --open-mode=append         # a requeued task appends to the same file
#SBATCH --signal=SIGUSR2@90        # the processes are warned 90 s before the time is up
#SBATCH --requeue                  # a task may be requeued
# A task that was stopped on request (preemption, the time is nearly up) or was killed is requeued; but at most this many
# times without a new checkpoint of any trial. 0: never.
max_requeues=5
set -euo pipefail

script=slurm/sweep.sh
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: this is a batch script: sbatch --array=0-7 $script [KEY=VALUE ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source-path=SCRIPTDIR/.. source=slurm/common.sh
source slurm/common.sh # the site, how many processes, and the number of the job
((nodes == 1 && per_node == 1)) || fail "a task of a sweep is one process, and this job has $per_node on each of $nodes" \
    "node(s); in $script: #SBATCH --nodes=1 and --ntasks-per-node=1, and more tasks in the array"
sweep_dir=
for argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ $argument != sweep_dir=* ]] || sweep_dir=${argument#*=}
done
[[ -n $sweep_dir ]] || arguments+=("sweep_dir=${sweep_dir:=runs/sweep-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}")

# --- go -----------------------------------------------------------------------

echo "Job $id on $SLURM_JOB_NODELIST: $per_task core(s), $gpus GPU(s), restarted ${SLURM_RESTART_COUNT:-0} time(s)"

run_step -m mnist_dist.sweep "${arguments[@]}"
((code != 0)) || exit 0
# Slurm says "Out Of Memory" of a task in which a training ran out of it, however the sweep went on and ended.
outlives_oom=yes
judge
[[ $fate != failed ]] || exit "$code"
checkpoints=("${sweep_dir//[\"\']/}"/trials/*/checkpoints/epoch-*.ckpt)
put_back "checkpoints $(cksum <<<"${checkpoints[*]}")" "continue with $sweep_dir" || true
exit "$code"
