#!/usr/bin/env bash
# Verify a cluster under Slurm: does it train correctly? From the folder that holds slurm/:
#     sbatch slurm/verify.sh [KEY=VALUE ...]
#
# Edit these lines. Options given to sbatch override them: sbatch --nodes=2 slurm/verify.sh strategy=horovod
#SBATCH --job-name=mnist_dist_verify
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1        # processes on each node for strategy=horovod: one per GPU
#SBATCH --cpus-per-task=2          # cores for each of them
##SBATCH --gpus-per-node=1         # remove one # to use GPUs
#SBATCH --time=01:00:00
#SBATCH --output=runs/verify-%j.log # below the folder from which sbatch was called
#SBATCH --no-requeue               # the verdict is on these nodes, now
#SBATCH --no-kill                  # when a node is lost, rank 0 still has to say so
# The checks have deadlines of their own (deadline_s); these are for what can hang around them. Seconds.
limit_s=3000 # for all of it
settle_s=90  # from the loss of the first process, or from the verdict, to the end of the others
set -euo pipefail

script=slurm/verify.sh
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: this is a batch script: sbatch $script [KEY=VALUE ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source-path=SCRIPTDIR/.. source=slurm/common.sh
source slurm/common.sh # the site, how many processes, and the number of the job
[[ -n $run_dir ]] || arguments+=("run_dir=${run_dir:=runs/verify-$id}")
folder=${run_dir//[\"\']/}
# An old verdict must not pass for this job's.
[[ ! -e $folder/verify.json ]] || fail "run_dir=$folder: holds a verification already; name another run_dir"

verdict() {
    sed -nE 's/^ "verdict": "([A-Z]+)",?$/\1/p' "$folder/verify.json" 2>/dev/null || true
}

# --- go -----------------------------------------------------------------------

echo "Job $id on $SLURM_JOB_NODELIST: $nodes node(s), $per_node process(es) on each with $per_task core(s)," \
    "$gpus GPU(s) on each"

# When a process is lost, rank 0 needs a moment to notice and to write down which one: it must not be ended as well. So not
# --kill-on-bad-exit=1, whatever the site's default is; and --no-kill, which keeps the step when Slurm gives up a node. Rank
# 0 ends the others with its verdict; what hangs is ended by --wait, which counts from the end of the first process.
srun "${layout[@]}" --kill-on-bad-exit=0 --wait="$settle_s" --no-kill ${srun_options[@]+"${srun_options[@]}"} \
    ${launcher[@]+"${launcher[@]}"} "$python" -m mnist_dist.verify "${arguments[@]}" &
srun=$!
stopped=
trap 'stopped="the job was stopped: its time was up, or it was cancelled"' TERM

# Not simply `wait`: srun itself may hang on a node that does not answer.
due_s=$limit_s ending=
while kill -0 "$srun" 2>/dev/null && [[ -z $stopped ]]; do
    if [[ -z $ending && (-n $(verdict) || -n $(ends_of_tasks)) ]]; then
        ending=yes due_s=$((SECONDS + 2 * settle_s)) # after --wait srun takes its time to give up a node
    fi
    if ((SECONDS > due_s || SECONDS > limit_s)); then
        stopped="srun did not end within $SECONDS s"
        break
    fi
    sleep 1 &
    wait "$!" || true
done
trap '' TERM # the lines below must reach the log
if [[ -n $stopped ]]; then
    kill -KILL "$srun" 2>/dev/null || true # Slurm ends the processes with the job
fi
code=0
wait "$srun" 2>/dev/null || code=$? # bash would report the KILL

# --- the verdict --------------------------------------------------------------

verdict=$(verdict)
ends=$(ends_of_tasks)
if [[ -n $verdict ]]; then
    case $verdict:$code in
        PASS:0 | DEGRADED:[01] | FAIL:*) ;; # DEGRADED:1: strict=true
        *)
            echo "FAIL: the verdict was $verdict, but then: ${stopped:-${ends:-exit code $code of srun}}; see $folder"
            exit 1
            ;;
    esac
    echo "$verdict: $folder (verify.html, verify.json, suspects.txt)"
    [[ $verdict != FAIL ]] || exit 1
    exit "$code"
fi

# Wrong input: each process has said so, in a line that begins with "error:".
((code != 2)) || grep -qv ' exit code 2$' <<<"$ends" || exit 2

# Without a verdict only srun can say who is to blame: the nodes that it could not reach or lost; else those where a process
# was lost. Not a process that noticed the loss of another one (exit code 76) or did not meet it (1), and not all nodes of
# several: then it is not their fault.
reports=$(logged | grep -E '^srun: error: ' | sed 's/^srun: error: //' || true)
unreached=$(sed -nE 's/.* failed on node ([^ ]+): .*|^Node failure on ([^ ]+)$/\1\2/p' <<<"$reports")
lost=$(sed -E '/ exit code (1|2|75|76)$/d; s/^srun: error: ([^ ]+): .*/\1/' <<<"$ends")
suspects=$(sort -u <<<"${unreached:-$lost}")
((nodes == 1 || $(wc -w <<<"$suspects") < nodes)) || suspects=
mkdir -p "$folder"
echo "$suspects" | sed '/^$/d' >"$folder/suspects.txt"
why=${stopped:-${reports:-exit code $code of srun}}
echo "FAIL: no verdict: ${why//$'\n'/; }; suspects: $(xargs <<<"${suspects:-none}")"
exit 1
