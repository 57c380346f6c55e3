#!/usr/bin/env bash
# Trains on a queued TPU slice, spot or not, and starts again after every preemption.
#
#   launch/queued.sh keep --name=dsr --project=P --zone=Z --type=v5litepod-64 [--spot] --bucket=B \
#       [--failures=3] [--poll=60] [--hold] \
#       -- python -m dsr_jax.train --config=... --workdir=~/bucket/runs/x
#   launch/queued.sh status | delete --name=dsr --project=P --zone=Z
#
# keep asks for the slice, waits for it, installs the last commit, and runs the command on all workers.
# It looks at the slice and at every worker each --poll seconds: a slice that was taken away is asked
# for again, a run that ended before its time continues from its last checkpoint. The run's folder must
# therefore be in the bucket, which the workers see at ~/bucket.
#
# keep ends with the run, and releases the slice (--hold keeps it). It also ends, with exit status 1,
# after --failures ends of the run in a row without a new checkpoint between them, waiting longer
# before each try, and after ten failed requests for the slice in a row. The workers' logs are copied to
# the bucket's logs/NAME before the slice is released. Start keep where it can stay: in tmux, or on a
# small virtual machine. Stopping it with Ctrl-C leaves slice and run alone; the same command takes them
# up again.
# --dry-run prints the commands of one round instead of running them.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
case $action in
    keep | status | delete) shift ;;
    *) usage "$0"; [[ $action == --help ]] && exit 0; exit 2 ;;
esac
parse_options name project zone type version bucket 'spot?' 'hold?' 'poll 60' 'failures 3' -- "$@"
need_place
place=(--project="$project" --zone="$zone")
# Polls in a row without an answer of the slice, or with workers in different states, to act after, and
# failed requests in a row to stop after.
patience=10

request() {
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
        --accelerator-type="$type" --runtime-version="$version" \
        --scopes=https://www.googleapis.com/auth/cloud-platform ${spot:+--spot}
}

release() {
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Prints the state of the queued slice, NONE if there is no such slice.
slice_state() {
    local output
    if output=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
        --format='value(state.state)' 2>&1); then
        echo "$output"
    elif [[ $output == *NOT_FOUND* || $output == *"not found"* ]]; then
        echo NONE
    else
        echo UNKNOWN
        printf '%s\n' "$output" >&2
    fi
}

# own_state_command: prints the worker's command for its state; what is left of another job is "absent".
own_state_command() {
    printf '%s\n' "$job_runs_command
if [ \"\$(cat ~/job.command 2> /dev/null)\" != $(printf '%q' "$(job_words)") ] && ! job_runs; then
    echo \"\$(hostname) absent\"; exit
fi
$job_state_command"
}

# job_state: prints one state for all workers: "unreachable" where one does not answer, "running" where
# no process has failed and one runs, "mixed" where some failed and others run. Where none runs, it is
# "absent" (one has nothing installed), the exit status of a failure, 75 last, how the run was stopped,
# or 0 where all are complete.
job_state() {
    local answers states
    answers=$(on_workers all "$(own_state_command)" 2> /dev/null) || { echo unreachable; return; }
    states=" $(sed -nE 's/^[^ ]+ (absent|running|lost|[0-9]+)$/\1/p' <<< "$answers" | tr '\n' ' ')"
    local state failed='' stopped=''
    for state in $states; do
        case $state in
            0 | absent | running) ;;
            lost | 130 | 143) stopped=$state ;;
            75) failed=${failed:-75} ;;
            *) failed=$state ;;
        esac
    done
    case $states in
        ' ') echo unreachable ;;
        *' running '*)
            [[ $states != *' absent '* ]] || failed=absent
            if [[ $failed || $stopped ]]; then echo mixed; else echo running; fi
            ;;
        *' absent '*) echo absent ;;
        *) echo "${failed:-${stopped:-0}}" ;;
    esac
}

# Prints the newest step that the run has saved in the bucket, 0 if there is none.
saved_step() {
    local workdir steps
    workdir=$(job_option workdir)
    # shellcheck disable=SC2088 # ~ of the workers
    steps=$(gcloud storage ls "gs://$bucket/${workdir#'~/bucket/'}/checkpoints/" 2> /dev/null |
        sed -nE 's|.*/([0-9]+)/$|\1|p' | sort -n | tail -n 1) || true
    echo "${steps:-0}"
}

# end KEEP_STATUS: copies the logs to the bucket, releases the slice, and ends.
end() {
    # shellcheck disable=SC2016 # expanded on the workers
    on_workers all 'mkdir -p ~/bucket/logs/'"$name"' && cp ~/job.log ~/bucket/logs/'"$name"'/$(hostname).log' ||
        note "a worker's log could not be copied to the bucket"
    if [ "$hold" ]; then
        note "the slice is still rented; release it with: launch/queued.sh delete"
    else
        release || note "the slice could not be released, and is still rented"
    fi
    exit "$1"
}

# count_failure TEXT: counts an end of the run; enough in a row without a new checkpoint end keep.
count_failure() {
    local step
    step=$(saved_step)
    if [ "$step" -gt "$saved" ]; then
        saved=$step
        failed=0
    fi
    failed=$((failed + 1))
    note "$1: $failed of at most $failures times since step $saved was saved"
    if [ "$failed" -ge "$failures" ]; then
        on_workers all 'tail -n 50 ~/job.log' >&2 || true
        note "giving up"
        end 1
    fi
    # Twice as long each time, up to 32 times --poll.
    sleep $((poll << (failed < 6 ? failed - 1 : 5)))
}

# count_refusal: counts requests that failed; enough in a row end keep.
count_refusal() {
    refused=$((refused + 1))
    note "the request failed $refused of at most $patience times"
    [ "$refused" -lt "$patience" ] || exit 1
}

# set_up: installs the last commit on all workers, and starts the run.
set_up() {
    note "installing and starting"
    { on_workers all "$job_kill_command" && install_workers && mount_bucket && start_job; } ||
        count_failure "installing or starting failed"
}

# start_again: continues the run on workers that have it installed.
start_again() {
    { mount_bucket && start_job; } || count_failure "starting failed"
}

# look_after_job: starts what the slice in state ACTIVE lacks; returns 0 when the run is complete.
look_after_job() {
    local state
    state=$(job_state)
    case $state in
        unreachable | mixed) waited=$((waited + 1)) ;;
        *) waited=0 ;;
    esac
    case $state in
        running) ;;
        0) return 0 ;;
        absent) set_up ;;
        unreachable)
            note "the slice does not answer"
            if [ "$waited" -ge "$patience" ]; then
                count_failure "the slice did not answer $waited times"
                waited=0
                release || note "the slice could not be released"
            fi
            ;;
        mixed)
            # The others end by themselves when they miss a process; these do not.
            if [ "$waited" -ge "$patience" ]; then
                count_failure "some workers run and others do not"
                waited=0
                set_up
            fi
            ;;
        lost | 130 | 143)
            count_failure "the run was stopped ($state)"
            start_again
            ;;
        *)
            count_failure "the run failed with status $state"
            start_again
            ;;
    esac
    return 1
}

keep() {
    local state before=''
    failed=0 waited=0 refused=0 saved=$(saved_step)
    while true; do
        state=$(slice_state)
        [ "$state" = "$before" ] || note "slice: $state"
        before=$state
        case $state in
            NONE) request || count_refusal ;;
            FAILED)
                release || note "the slice could not be released"
                count_refusal
                ;;
            SUSPENDED) release || note "the slice could not be released" ;;
            ACTIVE)
                refused=0
                if look_after_job; then
                    note "the run is complete"
                    end 0
                fi
                ;;
        esac
        sleep "$poll"
    done
}

case $action in
    keep)
        need type bucket
        check_checkout
        check_type
        check_bucket
        need_counts failures
        [[ $poll =~ ^[0-9]{1,5}$ ]] || die "--poll=$poll: must be a whole number of seconds"
        need_job
        # shellcheck disable=SC2088 # ~ of the workers
        check_paths '~/bucket'
        # shellcheck disable=SC2088
        check_workdir '~/bucket'
        [ "$version" ] || version=$(runtime_version "$type")
        if [ "$dry_run" ]; then
            request
            run gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
                --format='value(state.state)'
            install_workers
            mount_bucket
            start_job
            on_workers all "$job_state_command"
            echo '# after a preemption (SUSPENDED or FAILED), before all of this again:'
            release
        else
            keep
        fi
        ;;
    status)
        run gcloud compute tpus queued-resources describe "$name" "${place[@]}"
        ;;
    delete) release ;;
esac
