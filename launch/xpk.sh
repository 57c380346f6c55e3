#!/usr/bin/env bash
# Trains on TPU slices of Google Kubernetes Engine, with xpk (pip install xpk).
#
#   launch/xpk.sh cluster --name=C --project=P --zone=Z --type=v5litepod-64 [--slices=1] [--spot]
#   launch/xpk.sh run     --name=C --project=P --zone=Z --type=v5litepod-64 --workload=W --bucket=B \
#       [--slices=1] [--restarts=100] -- python -m dsr_jax.train --config=... --workdir=/bucket/runs/x
#   launch/xpk.sh logs | stop --name=C --project=P --zone=Z --workload=W
#   launch/xpk.sh delete      --name=C --project=P --zone=Z
#
# cluster makes a cluster and mounts the bucket into its workloads at /bucket. run sends the checkout
# in a container, which Kubernetes starts again, up to --restarts times, when a node is taken away;
# the run continues from its last checkpoint. --dry-run prints the commands instead of running them.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
case $action in
    cluster | run | logs | stop | delete) shift ;;
    *) usage "$0"; [[ $action == --help ]] && exit 0; exit 2 ;;
esac
parse_options name project zone type workload bucket spot 'slices 1' 'restarts 100' -- "$@"
need name project zone
place=(--cluster="$name" --project="$project" --zone="$zone")

case $action in
    cluster)
        need type
        if [ "$spot" ]; then capacity=--spot; else capacity=--on-demand; fi
        run xpk cluster create "${place[@]}" --tpu-type="$type" --num-slices="$slices" "$capacity" \
            --enable-gcsfuse-csi-driver
        ;;
    run)
        need type workload bucket
        [ ${#job[@]} -gt 0 ] || die "no command behind --"
        run xpk storage attach "$workload-bucket" "${place[@]}" --type=gcsfuse --bucket="$bucket" \
            --mount-point=/bucket --readonly=false --auto-mount=true --size=1
        run xpk workload create "${place[@]}" --workload="$workload" --tpu-type="$type" \
            --num-slices="$slices" --max-restarts="$restarts" --script-dir="$repository" \
            --base-docker-image=python:3.11 \
            --command="pip install -q -e '.[tpu,data,tensorboard]' -c constraints.txt && exec $(printf '%q ' "${job[@]}")"
        ;;
    logs)
        need workload
        run kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$workload" \
            --max-log-requests=64 --prefix
        ;;
    stop)
        need workload
        run xpk workload delete "${place[@]}" --workload="$workload" --force
        ;;
    delete) run xpk cluster delete "${place[@]}" --force ;;
esac
