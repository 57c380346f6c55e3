#!/usr/bin/env bash
# Runs a command as several processes of one run on this machine.
#
#   launch/local.sh --processes=2 [--cpu-devices=4] -- python -m dsr_jax.train --config=...
#
# With --cpu-devices each process computes on so many simulated CPU devices; without, process i gets
# GPU i alone. They meet on a free port of this machine. If one fails, the others are ended; Ctrl-C
# and SIGTERM are passed on, so that the run saves and stops. --dry-run prints the commands.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} == --help ]] && { usage "$0"; exit 0; }
parse_options processes cpu_devices port -- "$@"
need processes
need_counts processes
need_job
[ ! "$cpu_devices" ] || need_counts cpu_devices

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# environment RANK: the variables by which a process finds the others, as words for env.
environment() {
    variables=(
        "DSR_COORDINATOR=127.0.0.1:$port" "DSR_NUM_PROCESSES=$processes" "DSR_PROCESS_ID=$1"
    )
    if [ "$cpu_devices" ]; then
        variables+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$cpu_devices")
    else
        variables+=("CUDA_VISIBLE_DEVICES=$1")
    fi
}

if [ ! "$port" ]; then
    if [ "$dry_run" ]; then port=PORT; else port=$(free_port); fi
fi
children=()
for ((rank = 0; rank < processes; rank++)); do
    environment "$rank"
    if [ "$dry_run" ]; then
        run env "${variables[@]}" "${job[@]}"
    else
        env "${variables[@]}" "${job[@]}" &
        children+=($!)
    fi
done
[ "$dry_run" ] && exit 0

# shellcheck disable=SC2317,SC2329 # called by trap
pass_on() {
    stopped=1
    kill -TERM "${children[@]}" 2> /dev/null || true
}
stopped=''
trap pass_on INT TERM

status=0
left=${#children[@]}
while [ "$left" -gt 0 ]; do
    code=0
    wait -n "${children[@]}" || code=$?
    # A signal ends the wait, not a child.
    if [ "$stopped" ]; then
        stopped=''
        continue
    fi
    left=$((left - 1))
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$code
        # Those that saved and stopped do so together.
        [ "$code" -eq 143 ] || kill -TERM "${children[@]}" 2> /dev/null || true
    fi
done
exit "$status"
