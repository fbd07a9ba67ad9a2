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

# No MPI, no ssh: the processes find each other by what srun tells them (mnist_dist/launch/slurm.py). When one fails,
# srun ends the others.
srun "${layout[@]}" --kill-on-bad-exit=1 ${srun_options[@]+"${srun_options[@]}"} \
    ${launcher[@]+"${launcher[@]}"} "$python" -m mnist_dist.train "${arguments[@]}" &
srun=$!
# Slurm signals the processes and not this shell, but for --signal=B:..., scancel --batch and the like: pass it on.
trap 'signalled=yes; kill -USR2 "$srun" 2>/dev/null || true' TERM USR2
signalled=yes
while [[ -n $signalled ]]; do # a signal ends the waiting
    signalled='' code=0
    wait "$srun" || code=$?
done
trap '' TERM USR2 # a job that is being requeued gets these too; the lines below must reach the log
((code != 0)) || exit 0

# --- requeue, or not ----------------------------------------------------------

# srun exits with the highest of the exit codes, which may be that of a process that was ended because of another one.
# The cause is in the first line of "srun: error: node7: task 3: Killed", "tasks 0,2: Exited with exit code 75" ...
ends=$(ends_of_tasks)
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

checkpoints=("${run_dir//[\"\']/}"/checkpoints/epoch-*.ckpt)
checkpoint="no checkpoint"
[[ ! -e ${checkpoints[-1]} ]] || checkpoint=${checkpoints[-1]##*/}
requeues=runs/job-$id.requeues # a line for each
((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f "$requeues"
count=$(grep -c ", $checkpoint\$" "$requeues" 2>/dev/null || true)
if ((${count:-0} >= max_requeues)); then
    why_not="it was ${count:-0} time(s) already, with $checkpoint; max_requeues=$max_requeues in slurm/train.sh"
elif why_not=$({ mkdir -p runs && echo "$(date '+%F %T') $reason, $checkpoint" >>"$requeues"; } 2>&1); then
    echo "Job $id goes back into the queue: $reason; it will resume from $checkpoint"
    ! why_not=$(scontrol requeue incomplete "$id" 2>&1) || exit "$code"
fi
echo "error: job $id is not put back into the queue: $reason, but ${why_not:-scontrol requeue did not work}." \
    "To resume from $checkpoint, with the same options of sbatch: sbatch slurm/train.sh$(printf ' %q' "${arguments[@]}")" >&2
exit "$code"
