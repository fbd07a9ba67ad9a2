# What the batch scripts of slurm/ have in common; they source it in the folder that sbatch was called in, with their own
# arguments and their name in `script`.
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
# By this the processes of this start know each other (docs/security.md); od prints its 24 bytes in hexadecimal.
export MNIST_DIST_SECRET=${MNIST_DIST_SECRET:-$(od -An -v -N24 -tx1 /dev/urandom | tr -d ' \n')}
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

# --- one step of the job, and what its end means ------------------------------

# Start `python ARGUMENTS` in all processes, and wait for them; sets `code`.
run_step() {
    # No MPI, no ssh: the processes find each other by what srun tells them (mnist_dist/launch/slurm.py). When one fails,
    # srun ends the others.
    srun "${layout[@]}" --kill-on-bad-exit=1 ${srun_options[@]+"${srun_options[@]}"} \
        ${launcher[@]+"${launcher[@]}"} "$python" "$@" &
    srun=$!
    # Slurm signals the processes and not this shell, but for --signal=B:..., scancel --batch and the like: pass it on.
    trap 'signalled=yes; kill -USR2 "$srun" 2>/dev/null || true' TERM USR2
    signalled=yes
    while [[ -n $signalled ]]; do # a signal ends the waiting
        signalled='' code=0
        wait "$srun" || code=$?
    done
    trap '' TERM USR2 # a job that is being requeued gets these too; the lines below must reach the log
}

# Why the step ended with `code`, in `reason`; ends this script where the same would only happen again, or the job is not
# running any more.
find_reason() {
    local ends first failed state
    # srun exits with the highest of the exit codes, which may be that of a process that was ended because of another
    # one. The cause is in the first line of "srun: error: node7: task 3: Killed", "tasks 0,2: Exited with exit code 75".
    ends=$(ends_of_tasks)
    [[ -z ${outlives_oom:-} ]] || ends=$(grep -v "Out Of Memory" <<<"$ends" || true)
    first=${ends%%$'\n'*}
    case $first in
        *" exit code "*) code=${first##* } ;;
        *": Terminated"*) code=143 ;;
        *": User defined signal 2"*) code=140 ;;
        ?*) code=137 ;; # killed by another signal
    esac
    # One process failed by itself; others noticed its loss and ended before it.
    if ((code < 128)) && failed=$(grep -oE ' exit code [12]$' <<<"$ends"); then
        code=${failed##* }
    fi
    case $code in
        75 | 130 | 140 | 143) reason="stopped on request" ;; # the signals: before the processes listened to them
        *)
            # Wrong input, a failed training or too little memory would only fail again.
            ((code == 76 || code > 128)) && [[ $ends != *"Out Of Memory"* ]] || exit "$code"
            reason="a process of the job was lost"
            ;;
    esac
    # Cancelled by the user, or already requeued by Slurm itself (preemption, a lost node)?
    state=$(scontrol --oneliner show job "$id" | grep -oE 'JobState=[A-Z_]+' || true)
    [[ ${state:-JobState=RUNNING} == JobState=RUNNING ]] || exit "$code"
}

# Put the job back into the queue, and end this script; at most `max_requeues` times from the same PLACE. It will RESUME.
put_back() {
    local place=$1 resume=$2 requeues count why_not
    requeues=runs/job-$id.requeues # a line for each
    ((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f "$requeues"
    count=$(grep -c ", $place\$" "$requeues" 2>/dev/null || true)
    if ((${count:-0} >= max_requeues)); then
        why_not="it was ${count:-0} time(s) already, with $place; max_requeues=$max_requeues in $script"
    elif why_not=$({ mkdir -p runs && echo "$(date '+%F %T') $reason, $place" >>"$requeues"; } 2>&1); then
        echo "Job $id goes back into the queue: $reason; it will $resume"
        ! why_not=$(scontrol requeue incomplete "$id" 2>&1) || exit "$code"
    fi
    echo "error: job $id is not put back into the queue: $reason, but ${why_not:-scontrol requeue did not work}." \
        "To $resume, with the same options of sbatch: sbatch $script$(printf ' %q' "${arguments[@]}")" >&2
    exit "$code"
}
