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
arguments=() # for mnist_dist
options=()   # for the script: its own settings, where it has them
for argument in "$@"; do
    argument=${argument//%a/${SLURM_ARRAY_TASK_ID:-%a}} # seed=%a: the number of the array's task
    case $argument in
        min_nodes=* | spare_nodes=*)
            if [[ -v ${argument%%=*} ]]; then
                options+=("$argument")
                printf -v "${argument%%=*}" %s "${argument#*=}"
                continue
            fi
            ;;
        strategy=*) strategy=${argument#*=} ;;
        run_dir=* | +run_dir=* | ++run_dir=*) run_dir=${argument#*=} ;;
    esac
    arguments+=("$argument")
done

for argument in min_nodes spare_nodes; do
    [[ ${!argument:-0} =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "$argument=${!argument}: must be a whole number"
done

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=$((${#hosts[@]} - ${spare_nodes:-0}))
((nodes >= 1 && nodes >= ${min_nodes:-1})) || fail "the job has ${#hosts[@]} node(s), with" \
    "spare_nodes=${spare_nodes:-0} and min_nodes=${min_nodes:-1}; give sbatch --nodes=N, the spare nodes included"
gpus=${SLURM_GPUS_ON_NODE:-0}
if [[ -v SLURM_GPUS ]]; then # sbatch --gpus: srun would want so many for each step, on however few nodes
    unset SLURM_GPUS
    export SLURM_GPUS_PER_NODE=$gpus
fi
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

export PYTHONUNBUFFERED=1 # each line goes into the log at once (srun --unbuffered would pretend a terminal)
# By this the processes of this job know each other (docs/security.md); od prints its 24 bytes in hexadecimal.
MNIST_DIST_SECRET=$(od -An -v -N24 -tx1 /dev/urandom | tr -d ' \n')
export MNIST_DIST_SECRET

# Options of srun for the processes on these nodes, in `layout`.
lay_out() {
    local IFS=,
    layout=(
        --mpi=none --distribution=block --overlap --nodes="$#" --nodelist="$*"
        --ntasks="$(($# * per_node))" --ntasks-per-node="$per_node" --cpus-per-task="$per_task"
    )
}
lay_out "${hosts[@]:0:nodes}"

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

# srun ends the other processes when one fails, but waits long for those on a node that does not answer. Seconds.
end_s=60     # from the first end of a process to the end of the step
end_lost_s=5 # the same, once a process was killed, or has lost another one

asked= # to stop, by a signal to this script
srun=  # the process of the step

# Slurm signals the processes and not this shell, but for --signal=B:..., scancel --batch and the like: pass it on.
trap 'asked=yes; kill -USR2 "$srun" 2>/dev/null || true' TERM USR2

# Start `python ARGUMENTS` in all processes, and wait for them; sets `code`, and when the first one ended in `ended_at`.
run_step() {
    local size seen due_s='' recent
    log_size=$(stat --dereference --format=%s "$log")
    seen=$log_size ended_at=
    # No MPI, no ssh: the processes find each other by what srun tells them (mnist_dist/launch/slurm.py). When one fails,
    # srun ends the others.
    srun "${layout[@]}" --job-name=training --kill-on-bad-exit=1 ${srun_options[@]+"${srun_options[@]}"} \
        ${launcher[@]+"${launcher[@]}"} "$python" "$@" &
    srun=$!
    [[ -z $asked ]] || kill -USR2 "$srun"
    while kill -0 "$srun" 2>/dev/null; do
        sleep 1 &
        wait "$!" || true # a signal ends the waiting
        size=$(stat --dereference --format=%s "$log")
        if ((size > seen)); then
            recent=$(tail --bytes="+$((seen + 1))" "$log" | grep -E 'srun: error: [^ ]+: tasks? [-0-9,]+: ' || true)
            seen=$((size - 1000 > log_size ? size - 1000 : log_size)) # a line may not be complete yet
            if [[ -n $recent ]]; then
                ended_at=${ended_at:-$(date +%s.%1N)} due_s=${due_s:-$((SECONDS + end_s))}
                if ((due_s > SECONDS + end_lost_s)) && grep -qE 'code 76$|: (Killed|Aborted|Segm|Bus)' <<<"$recent"; then
                    due_s=$((SECONDS + end_lost_s))
                fi
            fi
        fi
        if [[ -n $due_s ]] && ((SECONDS >= due_s)); then
            end_step
            break
        fi
    done
    code=0
    wait "$srun" 2>/dev/null || code=$? # bash would report a KILL
    srun='' ended_at=${ended_at:-$(date +%s.%1N)}
}

# End the processes on the nodes that answer, and srun.
end_step() {
    local step name
    while read -r step name; do
        [[ $name != training ]] || scancel "$id.${step##*.}" 2>/dev/null || true
    done < <(squeue --noheader --steps --jobs="$id" --format='%i %j' 2>/dev/null || true)
    sleep 1
    kill -KILL "$srun" 2>/dev/null || true
}

# What the end of the step means, in `fate` and `reason`; ends this script if the job is not running any more.
judge() {
    local ends failed state
    # srun exits with the highest of the exit codes, which may be that of a process that was ended because of another
    # one. The cause is in the first line of "srun: error: node7: task 3: Killed", "tasks 0,2: Exited with exit code 75".
    ends=$(ends_of_tasks)
    [[ -z ${outlives_oom:-} ]] || ends=$(grep -v "Out Of Memory" <<<"$ends" || true)
    case ${ends%%$'\n'*} in
        *" exit code "*) code=${ends%%$'\n'*} code=${code##* } ;;
        *": Terminated"*) code=143 ;;
        *": User defined signal 2"*) code=140 ;;
        ?*) code=137 ;; # killed by another signal
    esac
    # One process failed by itself; others noticed its loss and ended before it.
    if ((code < 128)) && failed=$(grep -oE ' exit code [12]$' <<<"$ends"); then
        code=${failed##* }
    fi
    if [[ -z $asked ]] && logged | grep -q '^srun: error: Node failure on '; then
        fate=lost reason="a node was lost"
    elif [[ -n $asked ]] || ((code == 75 || code == 130 || code == 140 || code == 143)); then
        fate=stopped reason="stopped on request" # the signals: before the processes listened to them
    elif ((code == 76 || code > 128)) && [[ $ends != *"Out Of Memory"* ]]; then
        fate=lost reason="a process of the job was lost"
    else
        fate=failed reason= # wrong input, a failed training or too little memory: it would only fail again
    fi
    # Cancelled by the user, or already requeued by Slurm itself (preemption, a lost node)?
    state=$(job_state)
    [[ ${state:-RUNNING} == RUNNING ]] || exit "$code"
}

# Slurm's word for it; empty if Slurm cannot be asked now.
job_state() {
    scontrol --oneliner show job "$id" 2>/dev/null | sed -nE 's/.* JobState=([A-Z_]+) .*/\1/p'
}

requeues=runs/job-$id.requeues # a line for each
((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f "$requeues"

# Put the job back into the queue; at most `max_requeues` times from the same PLACE. It will RESUME.
put_back() {
    local place=$1 resume=$2 count why_not
    trap '' TERM USR2 # a job that is being requeued gets these; the lines below must reach the log
    count=$(grep -c ", $place\$" "$requeues" 2>/dev/null || true)
    if ((${count:-0} >= max_requeues)); then
        why_not="it was ${count:-0} time(s) already, with $place; max_requeues=$max_requeues in $script"
    elif why_not=$({ mkdir -p runs && echo "$(date '+%F %T') $reason, $place" >>"$requeues"; } 2>&1); then
        echo "Job $id goes back into the queue: $reason; it will $resume"
        ! why_not=$(scontrol requeue incomplete "$id" 2>&1) || return 0
    fi
    echo "error: job $id is not put back into the queue: $reason, but ${why_not:-scontrol requeue did not work}." \
        "To $resume, with the same options of sbatch:" \
        "sbatch $script$(printf ' %q' ${options[@]+"${options[@]}"} "${arguments[@]}")" >&2
    return 1
}

# --- which nodes answer -------------------------------------------------------

# Those of these nodes that can start a process.
answering() {
    local node
    for node; do
        (! timeout 20 srun --mpi=none --overlap --immediate=10 --nodes=1 --ntasks=1 --cpus-per-task=1 \
            --nodelist="$node" --job-name=probe bash -c 'trap "" TERM USR2' &>/dev/null || echo "$node") &
    done
    wait
}
