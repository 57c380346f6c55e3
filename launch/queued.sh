#!/usr/bin/env bash
# Trains on a queued TPU slice, spot or not, and starts again after every preemption.
#
#   launch/queued.sh keep --name=dsr --project=P --zone=Z --type=v5litepod-64 --spot --bucket=B \
#       -- python -m dsr_jax.train --config=... --workdir=~/bucket/runs/x
#   launch/queued.sh status | delete --name=dsr --project=P --zone=Z
#
# keep asks for the slice, waits for it, installs, runs the command on all workers, and looks after
# it every --poll seconds (60): a slice that was taken away is asked for again, a run that was
# stopped or lost continues from its last checkpoint, which must therefore lie in the bucket. It ends
# with the run: after exit status 0, or with the log after --failures (3) failures in a row of the run
# itself. Start it where it can stay: in tmux, or on a small virtual machine. Stopping it with Ctrl-C
# leaves slice and run alone; the same command takes them up again.
# --dry-run prints the commands of one round instead of running them.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
case $action in
    keep | status | delete) shift ;;
    *) usage "$0"; [[ $action == --help ]] && exit 0; exit 2 ;;
esac
parse_options name project zone type version bucket spot 'poll 60' 'failures 3' -- "$@"
need name project zone
place=(--project="$project" --zone="$zone")

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

# Prints the state of the job, "unreachable" where the slice does not answer.
job_state() {
    on_workers 0 "$job_state_command" 2> /dev/null || echo unreachable
}

say() {
    printf '%s %s\n' "$(date -u +%FT%TZ)" "$*" >&2
}

# Starts what the slice in state ACTIVE lacks; returns 0 when the run is complete.
look_after_job() {
    local state
    state=$(job_state)
    case $state in
        running) failed=0 ;;
        0) return 0 ;;
        unreachable) say "the slice does not answer" ;;
        absent)
            say "installing and starting"
            if ! { install_workers && start_job; }; then say "that failed; trying again"; fi
            ;;
        lost | 130 | 143)
            say "the run was stopped ($state); continuing it"
            start_job || say "that failed; trying again"
            ;;
        *)
            failed=$((failed + 1))
            say "the run failed with status $state, $failed of at most $failures times"
            if [ "$failed" -ge "$failures" ]; then
                on_workers 0 'tail -n 50 ~/job.log' >&2
                exit 1
            fi
            start_job || say "that failed; trying again"
            ;;
    esac
    return 1
}

keep() {
    local state before=''
    failed=0
    while true; do
        state=$(slice_state)
        [ "$state" = "$before" ] || say "slice: $state"
        before=$state
        case $state in
            NONE) request ;;
            FAILED | SUSPENDED) release ;;
            ACTIVE)
                if look_after_job; then
                    say "the run is complete; release the slice with: launch/queued.sh delete"
                    return 0
                fi
                ;;
        esac
        sleep "$poll"
    done
}

case $action in
    keep)
        need type
        [ ${#job[@]} -gt 0 ] || die "no command behind --"
        [ "$version" ] || version=$(runtime_version "$type")
        if [ "$dry_run" ]; then
            request
            run gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
                --format='value(state.state)'
            install_workers
            start_job
            on_workers 0 "$job_state_command"
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
