#!/usr/bin/env bash
# Trains on a TPU VM slice: create, install, run, logs, status, stop, delete.
#
#   launch/tpu_vm.sh create  --name=dsr --project=P --zone=Z --type=v5litepod-16 [--spot]
#   launch/tpu_vm.sh install --name=dsr --project=P --zone=Z [--bucket=B]
#   launch/tpu_vm.sh run     --name=dsr --project=P --zone=Z -- python -m dsr_jax.train --config=...
#   launch/tpu_vm.sh logs | status | stop | delete  --name=dsr --project=P --zone=Z
#
# install copies the last commit to every worker, and mounts a Cloud Storage bucket at ~/bucket. A
# run's folder must be in it if the slice has more than one worker. run starts the command on all
# workers and returns. stop lets the run save a checkpoint first; the same command continues it.
# --dry-run prints the commands instead of running them.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
case $action in
    create | install | run | logs | status | stop | delete) shift ;;
    *) usage "$0"; [[ $action == --help ]] && exit 0; exit 2 ;;
esac
parse_options name project zone type version bucket 'spot?' -- "$@"
need_place
[ ! "$bucket" ] || check_bucket
[ ! "$type" ] || check_type

case $action in
    create)
        need type
        [ "$version" ] || version=$(runtime_version "$type")
        run gcloud compute tpus tpu-vm create "$name" --project="$project" --zone="$zone" \
            --accelerator-type="$type" --version="$version" \
            --scopes=https://www.googleapis.com/auth/cloud-platform ${spot:+--spot}
        ;;
    install)
        check_checkout
        install_workers
        mount_bucket
        ;;
    run)
        need_job
        # shellcheck disable=SC2088 # ~ of the workers
        check_paths '~/bucket'
        start_job
        ;;
    logs) on_workers 0 'tail -n 200 -F ~/job.log' ;;
    status) on_workers all "$job_state_command" ;;
    # One process is enough: they agree on a step to save at.
    stop) on_workers 0 "kill -TERM \"\$(cat ~/job.pid)\"" ;;
    delete)
        run gcloud compute tpus tpu-vm delete "$name" --project="$project" --zone="$zone" --quiet
        ;;
esac
