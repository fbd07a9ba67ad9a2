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
#SBATCH --no-kill                  # when a node is lost, the job keeps the others
# A job that has lost a process or a node goes on with the nodes that answer, from its last checkpoint, if these are at
# least so many. These two may also be given as arguments: sbatch --nodes=3 slurm/train.sh spare_nodes=1
min_nodes=1
# So many of the job's nodes wait until one is lost, and take its place.
spare_nodes=0
# A job that was stopped on request (preemption, the time is nearly up), or cannot go on after a loss, is requeued, and
# resumes from its last checkpoint; but at most this many times from the same checkpoint. 0: never.
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
folder=${run_dir//[\"\']/}
export MNIST_DIST_LOSSES=$folder.losses # for the training: what was lost, a line each
suspects=$folder.suspects.txt           # nodes, for sbatch --exclude=./FILE
((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f "$suspects"

find_checkpoint() {
    local files=("$folder"/checkpoints/epoch-*.ckpt)
    checkpoint="no checkpoint"
    [[ ! -e ${files[-1]} ]] || checkpoint=${files[-1]##*/}
}

# --- what is lost -------------------------------------------------------------

# Note a loss: when, which nodes do not answer any more, and how that was noticed.
note_loss() {
    {
        mkdir -p "$(dirname "$folder")" &&
            printf '%s\t%s\t%s\n' "$1" "${2// /,}" "$3" >>"$MNIST_DIST_LOSSES" &&
            { [[ -z $2 ]] || tr ' ' '\n' <<<"$2" >>"$suspects"; }
    } || echo "warning: this loss could not be noted beside $folder" >&2
}

# Take the nodes that do not answer out of `hosts`, for all time; they are in `lost`.
drop_lost_nodes() {
    local host live tries=0
    ((${#hosts[@]} > 1)) || return 0
    [[ $fate != lost ]] || echo "Job $id: $reason; asking which of its ${#hosts[@]} nodes answer"
    # This script's own node is there: if it does not answer, it is Slurm that cannot be asked now.
    until live=" $(answering "${hosts[@]}" | tr '\n' ' ')" && [[ $live == *" $SLURMD_NODENAME "* ]]; do
        ((++tries < 6)) || return 0
        sleep 10
    done
    for host in "${hosts[@]}"; do
        [[ $live == *" $host "* ]] || lost+="${lost:+ }$host"
    done
    mapfile -t hosts < <(printf '%s\n' "${hosts[@]}" | grep --invert-match --fixed-strings --line-regexp "${lost// /$'\n'}")
}

# Whether the job has some minutes left. Else it would not be warned any more: the signal was for the last step.
has_time() {
    local end
    end=$(scontrol --oneliner show job "$id" 2>/dev/null | sed -nE 's/.* EndTime=([^ ]+) .*/\1/p')
    [[ -n $end ]] && end=$(date --date="$end" +%s 2>/dev/null) || return 0 # there is no limit
    ((end - $(date +%s) > 150))
}

# How the loss was noticed, in words, from the log.
describe_loss() {
    local how
    how=$(logged | grep -oE 'rank [0-9]+ \([^)]*\) is gone \([^)]*\)' | head --lines=1 || true)
    [[ -n $how ]] || how=$(logged | sed -n 's/^srun: error: //p' | head --lines=1)
    echo "${how:-exit code $code of srun}"
}

# --- the node of this script --------------------------------------------------

# It may be lost like any other, and with --no-kill the job would then live on with nobody to lead it. So processes on
# two other nodes wait for signs of life; without any for 15 s one asks it and puts the job back into the queue, or ends it.
guard() {
    local patience_s=$1
    trap '' TERM USR2
    code=1 reason="node $own, with the batch script, does not answer"
    while :; do
        while read -r -t "$patience_s" _; do :; done
        if [[ -z $(answering "$own") ]]; then
            case $(job_state) in
                RUNNING) break ;;
                ?*) return ;; # the script has ended, and Slurm ends the job
            esac
        fi
        sleep 10
    done
    find_checkpoint
    note_loss "$(date +%s.%1N)" "$own" "the node of the batch script does not answer"
    put_back "$checkpoint" "resume from $checkpoint" || scancel "$id"
}

declare -A guards=() # the srun of each, by node
stand_guard() {
    local own=$SLURMD_NODENAME host patience_s=15 log_file
    log_file=$(readlink -f "$log")
    for host in "${!guards[@]}"; do
        if [[ " ${hosts[*]} " != *" $host "* ]]; then # it may only be cut off from here
            kill -KILL "${guards[$host]}" 2>/dev/null || true # srun's helper then ends the step, wherever it runs
            unset "guards[$host]"
        fi
    done
    for host in "${hosts[@]}"; do
        [[ $host != "$own" ]] || continue
        ((patience_s <= 75)) || break
        if [[ -z ${guards[$host]:-} ]] || ! kill -0 "${guards[$host]}" 2>/dev/null; then
            {
                exec {quiet}<> <(:) # nothing ever comes from there
                while ! read -r -t 5 -u "$quiet"; do echo alive; done
            } 2>/dev/null |
                srun --mpi=none --overlap --nodes=1 --ntasks=1 --cpus-per-task=1 --nodelist="$host" --job-name=guard bash -c "
                    $(declare -p own id script folder options arguments max_requeues requeues suspects MNIST_DIST_LOSSES)
                    $(declare -f find_checkpoint note_loss put_back answering job_state guard)
                    guard $patience_s >>'$log_file' 2>&1
                " &>/dev/null &
            guards[$host]=$!
        fi
        patience_s=$((patience_s + 60))
    done
}

# --- go -----------------------------------------------------------------------

echo "Job $id on $SLURM_JOB_NODELIST: $nodes node(s), $per_node process(es) on each with $per_task core(s)," \
    "$gpus GPU(s) on each, restarted ${SLURM_RESTART_COUNT:-0} time(s)"

# shellcheck disable=SC2046  # a number each
trap 'kill -KILL $(jobs -p) ${guards[@]+"${guards[@]}"} 2>/dev/null || true' EXIT
last= # the checkpoint at the last loss
while :; do
    stand_guard
    lay_out "${hosts[@]:0:nodes}"
    run_step -m mnist_dist.train "${arguments[@]}"
    ((code != 0)) || exit 0
    judge
    lost=
    [[ $fate == stopped ]] || drop_lost_nodes # whatever the processes say: their end may be due to a lost node
    if [[ -n $lost ]]; then
        fate=lost reason="lost node(s) $lost"
    elif [[ $fate == failed ]]; then
        exit "$code"
    fi
    find_checkpoint
    if [[ $fate == lost ]]; then
        note_loss "$ended_at" "$lost" "$(describe_loss)"
        ((nodes <= ${#hosts[@]})) || nodes=${#hosts[@]}
        if ((nodes >= min_nodes)) && [[ $checkpoint != "$last" && -z $asked ]] && has_time; then
            echo "Job $id goes on with $nodes node(s): $reason; it resumes from $checkpoint"
            last=$checkpoint
            continue
        fi
    fi
    put_back "$checkpoint" "resume from $checkpoint" || true
    exit "$code"
done
