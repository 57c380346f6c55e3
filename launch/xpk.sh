#!/usr/bin/env bash
# Trains on TPU slices of Google Kubernetes Engine, with xpk (pip install xpk).
#
#   launch/xpk.sh cluster --name=C --project=P --zone=Z --type=v5litepod-64 [--slices=1] [--spot]
#   launch/xpk.sh run     --name=C --project=P --zone=Z --type=v5litepod-64 --workload=W --bucket=B \
#       [--slices=1] [--restarts=100] -- python -m dsr_jax.train --config=... --workdir=/bucket/runs/x
#   launch/xpk.sh logs | stop --name=C --project=P --zone=Z --workload=W
#   launch/xpk.sh delete      --name=C --project=P --zone=Z
#
# run mounts the bucket into the workload's containers at /bucket, and sends the last commit in a
# container image. Kubernetes starts the run again, up to --restarts times, when a node is taken away,
# a process is lost or the run hangs; it continues from its last checkpoint. A run that ends with an
# error of its own is not started again. --dry-run prints the commands instead of running them.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
case $action in
    cluster | run | logs | stop | delete) shift ;;
    *) usage "$0"; [[ $action == --help ]] && exit 0; exit 2 ;;
esac
parse_options name project zone type workload bucket 'spot?' 'slices 1' 'restarts 100' -- "$@"
need_place
need_counts slices restarts
[ ! "$type" ] || check_type
[ ! "$workload" ] || check_label workload 40
place=(--cluster="$name" --project="$project" --zone="$zone")

# send_job: sends the last commit and the job to the cluster. Beside xpk's own exit codes to start again
# after, 42 and 127-255, is 75: a process was lost or hung. What names the storage is a Kubernetes name.
send_job() {
    local folder=dsr_jax storage=${bucket//[^a-z0-9-]/-} status=0
    [ "$dry_run" ] || folder=$(mktemp -d)/dsr_jax
    run mkdir -p "$folder"
    make_archive "$folder.tar.gz"
    run tar -xzf "$folder.tar.gz" -C "$folder"
    run xpk storage attach "$storage" "${place[@]}" --type=gcsfuse --bucket="$bucket" \
        --mount-point=/bucket --readonly=false --auto-mount=false --size=1 &&
        run xpk workload create "${place[@]}" --workload="$workload" --tpu-type="$type" \
            --num-slices="$slices" --max-restarts="$restarts" --restart-on-exit-codes=75 \
            --termination-grace-period-seconds=300 --storage="$storage" --script-dir="$folder" \
            --base-docker-image=python:3.11 \
            --command="pip install -q --retries 10 -e '.[tpu,data,tensorboard]' -c constraints.txt && exec $(printf '%q ' "${job[@]}")" ||
        status=$?
    [ "$dry_run" ] || rm -rf "$(dirname "$folder")"
    return "$status"
}

case $action in
    cluster)
        need type
        if [ "$spot" ]; then capacity=--spot; else capacity=--on-demand; fi
        run xpk cluster create "${place[@]}" --tpu-type="$type" --num-slices="$slices" "$capacity" \
            --enable-gcsfuse-csi-driver
        ;;
    run)
        need type workload bucket
        check_bucket
        check_checkout
        need_job
        check_paths /bucket
        check_workdir /bucket
        send_job
        ;;
    logs)
        need workload
        run kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$workload" \
            --container=jax-tpu --max-log-requests=64 --prefix
        ;;
    stop)
        need workload
        run xpk workload delete "${place[@]}" --workload="$workload" --force
        ;;
    delete) run xpk cluster delete "${place[@]}" --force ;;
esac
