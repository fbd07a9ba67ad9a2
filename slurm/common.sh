# What slurm/train.sh and slurm/verify.sh have in common; they source it in the folder that sbatch was called in, with
# their own arguments and their name in `script`.
# shellcheck shell=bash disable=SC2034,SC2154  # they use its variables, and set `script`

fail() {
    echo "error: $*" >&2
    exit 2
}

# --- the site: modules, environment, network (slurm/site.sh.example) ----------

python=python3
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
launcher=() # what comes before python on each node: a container, for example
srun_options=()
site=${MNIST_DIST_SITE:-slurm/site.sh}
if [[ -f $site ]]; then
    # Modules and environments are often not written for these two options.
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
        run_dir=* | +run_dir=* | ++run_dir=*) run_dir=${argument#*=} ;;
    esac
    arguments+=("$argument")
done

nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
per_node=${SLURM_NTASKS_PER_NODE:-1}
case $strategy in
    single | mirrored)
        ((nodes == 1)) || fail "strategy=$strategy trains on one node and the job has $nodes;" \
            "in $script: #SBATCH --nodes=1 (or sbatch --nodes=1), or strategy=horovod or multiworker"
        per_node=1
        ;;
    multiworker) per_node=1 ;;
    *) # horovod; auto, which takes horovod or multiworker for several processes
        if [[ $strategy == auto ]] && ((nodes == 1)); then
            per_node=1 # mirrored, with all GPUs
        elif ((gpus > 0 && per_node != gpus)); then
            fail "strategy=$strategy needs one task per GPU and the job has $per_node task(s) and $gpus GPU(s) on a" \
                "node; in $script: #SBATCH --ntasks-per-node=$gpus (or sbatch --ntasks-per-node=$gpus)"
        fi
        ;;
esac
# The job's cores on the node where it has fewest: 4(x2),2 means 4, 4 and 2.
cores=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//' | sort -n | sed -n 1p)
per_task=$((cores >= per_node ? cores / per_node : 1))

# A requeued job keeps its number.
id=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# --- srun ---------------------------------------------------------------------

layout=(
    --mpi=none --distribution=block
    --nodes="$nodes" --ntasks="$((nodes * per_node))" --ntasks-per-node="$per_node" --cpus-per-task="$per_task"
)
export PYTHONUNBUFFERED=1 # each line goes into the log at once (srun --unbuffered would pretend a terminal)

log=/proc/$$/fd/2 # where srun reports how each process ended
[[ -f $log ]] || log=/dev/null
log_size=$(stat --dereference --format=%s "$log")

# What has been written into the log since.
logged() {
    tail --bytes="+$((log_size + 1))" "$log"
}

# "srun: error: node7: task 3: Killed", "tasks 0,2: Exited with exit code 75" ...: a line for each node and kind of end.
ends_of_tasks() {
    logged | grep -oE 'srun: error: [^ ]+: tasks? [-0-9,]+: .+' || true
}
