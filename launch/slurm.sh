#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one process per GPU.
#
#   launch/slurm.sh --name=dsr --nodes=2 --gpus=8 [--time=24:00:00] [--partition=P] [--account=A] \
#       [--cpus=8] [--failures=3] -- python -m dsr_jax.train --config=... --workdir=/shared/runs/x
#
# Submits a job that runs the command with this checkout's .venv, if it has one, from a folder that
# all nodes see. --gpus is the number of GPUs of a node, --cpus that of CPU cores of a process. Two
# minutes before its time is over the run saves a checkpoint, and the job goes back into the queue, as
# it does when a node fails or is taken away, or when a process is lost or hangs (at most --failures
# times in a row without a new checkpoint between them; they are listed in slurm-NAME-JOB.failures).
# Output: slurm-NAME-JOB.log. --dry-run prints the command and the job's script instead of submitting
# it.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} == --help ]] && { usage "$0"; exit 0; }
parse_options 'name dsr' nodes gpus 'time 24:00:00' partition 'cpus 8' account 'failures 3' -- "$@"
need nodes gpus
need_counts nodes gpus cpus failures
# shellcheck disable=SC2154 # set by parse_options
[[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] ||
    die "--time=$time: must be minutes, hours:minutes:seconds or days-hours"
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
    die "--name=$name: must be letters, digits, '.', '_' and '-': it is part of files' names"
need_job

# Each process sees all GPUs of its node, of which JAX takes the one with the process's local number.
# srun does not take over the job's --cpus-per-task (since SLURM 22.05).
script() {
    cat <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-$name-%j.log
${partition:+#SBATCH --partition=$partition
}${account:+#SBATCH --account=$account
}
cd $(printf '%q' "$repository")
[ ! -d .venv ] || export PATH=\$PWD/.venv/bin:\$PATH
srun --cpus-per-task=$cpus --gpu-bind=none --kill-on-bad-exit=1 $(printf '%q ' "${job[@]}")
status=\$?
record=slurm-$name-\$SLURM_JOB_ID.failures
workdir=$(printf '%q' "$(job_option workdir)")
saved=\$(ls "\${workdir/#\~/\$HOME}/checkpoints" 2> /dev/null | grep -xE '[0-9]+' | sort -n | tail -n 1)
case \$status in
    143) # 128 + SIGTERM: the run has saved and is to continue.
        rm -f "\$record"
        scontrol requeue "\$SLURM_JOB_ID" ;;
    75) # A process was lost or hung. After a new checkpoint, failures are counted from one.
        [ "\$(tail -n 1 "\$record" 2> /dev/null | cut -d ' ' -f 2)" = "\${saved:-0}" ] || rm -f "\$record"
        echo "step \${saved:-0} \$(date): status 75 on \$SLURM_JOB_NODELIST" >> "\$record"
        if [ "\$(wc -l < "\$record")" -lt $failures ]; then
            scontrol requeue "\$SLURM_JOB_ID"
        else
            echo "$failures failures in a row, see \$record: not queued again" >&2
        fi ;;
esac
exit \$status
EOF
}

if [ "$dry_run" ]; then
    echo "sbatch <<'END'"
    script
    echo END
else
    script | sbatch
fi
