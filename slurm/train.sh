#!/usr/bin/env bash
# Train under Slurm; from the folder that holds slurm/:  sbatch slurm/train.sh [KEY=VALUE ...]
#
# What to edit is here. An option given to sbatch itself is stronger: sbatch --nodes=2 slurm/train.sh strategy=horovod
#SBATCH --job-name=mnist_dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1        # processes on each node for strategy=horovod: as many as GPUs
#SBATCH --cpus-per-task=2          # cores for each of them
##SBATCH --gpus-per-node=1         # with one # in front it counts; without GPUs leave it alone
#SBATCH --time=01:00:00
#SBATCH --output=runs/job-%j.log   # below the folder that sbatch was called in
#SBATCH --open-mode=append         # a job that is started again goes on in the same file
#SBATCH --signal=SIGUSR2@90        # the processes are warned 90 s before the time is up
#SBATCH --requeue                  # preempted, or a node lost: back into the queue
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a batch script: sbatch slurm/train.sh [KEY=VALUE ...]"
cd "${SLURM_SUBMIT_DIR:-.}"

# --- the site: modules, environment, network (slurm/site.sh.example) ----------

python=python3
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
launcher=() # what comes before python on each node: a container, for example
srun_options=()
site=${MNIST_DIST_SITE:-slurm/site.sh}
if [[ -f $site ]]; then
    # What modules and environments run is not written for these two.
    set +eu
    # shellcheck source=/dev/null
    source "$site"
    set -eu
fi

# --- how many processes -------------------------------------------------------

strategy=auto
run_dir=
arguments=()
for argument in "$@"; do
    argument=${argument//%a/${SLURM_ARRAY_TASK_ID:-%a}} # seed=%a: the number of the array's task
    case $argument in
        strategy=*) strategy=${argument#*=} ;;
        run_dir=* | +run_dir=* | ++run_dir=*) run_dir=given ;;
    esac
    arguments+=("$argument")
done

nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
per_node=${SLURM_NTASKS_PER_NODE:-1}
case $strategy in
    single | mirrored)
        ((nodes == 1)) || fail "strategy=$strategy trains on one node and the job has $nodes;" \
            "in slurm/train.sh: #SBATCH --nodes=1 (or sbatch --nodes=1), or strategy=horovod or multiworker"
        per_node=1
        ;;
    multiworker) per_node=1 ;;
    *) # horovod; auto, which takes horovod or multiworker for several processes
        if [[ $strategy == auto ]] && ((nodes == 1)); then
            per_node=1 # mirrored, with all GPUs
        elif ((gpus > 0 && per_node != gpus)); then
            fail "strategy=$strategy needs one task per GPU and the job has $per_node task(s) and $gpus GPU(s) on a" \
                "node; in slurm/train.sh: #SBATCH --ntasks-per-node=$gpus (or sbatch --ntasks-per-node=$gpus)"
        fi
        ;;
esac
# The job's cores on the node where it has the fewest: 4(x2),2 means 4, 4 and 2.
cores=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//' | sort -n | sed -n 1p)
per_task=$((cores >= per_node ? cores / per_node : 1))

# --- where the results go -----------------------------------------------------

# The number of the job stays when it is put back into the queue.
id=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
[[ -n $run_dir ]] || arguments+=("run_dir=runs/job-$id")

# --- go -----------------------------------------------------------------------

echo "Job $id on $SLURM_JOB_NODELIST: $nodes node(s), $per_node process(es) on each with $per_task core(s)," \
    "$gpus GPU(s) on each, restarted ${SLURM_RESTART_COUNT:-0} time(s)"

# No MPI, no ssh: the processes find each other by what srun tells them (mnist_dist/topology.py). When one fails, srun
# ends the others.
export PYTHONUNBUFFERED=1 # each line goes into the log at once (srun --unbuffered would pretend a terminal)
srun --mpi=none --distribution=block --kill-on-bad-exit=1 \
    --nodes="$nodes" --ntasks="$((nodes * per_node))" --ntasks-per-node="$per_node" --cpus-per-task="$per_task" \
    ${srun_options[@]+"${srun_options[@]}"} \
    ${launcher[@]+"${launcher[@]}"} "$python" -m mnist_dist.train "${arguments[@]}"
