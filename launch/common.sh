# What the launchers share: options, and commands that --dry-run only prints. Sourced, not run.
# shellcheck shell=bash

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Options that several launchers have.
name='' project='' zone='' bucket='' dry_run='' job=()

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# run CMD...: runs it; with --dry-run prints it as one could type it.
run() {
    if [ "${dry_run:-}" ]; then
        local word line=''
        for word in "$@"; do
            if [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then
                line+=" $word"
            else
                line+=" '${word//\'/\'\\\'\'}'"
            fi
        done
        printf '%s\n' "${line# }"
    else
        "$@"
    fi
}

# parse_options "NAME DEFAULT" ... -- ARGUMENTS: sets variables from --name=value, bare flags to 1,
# and puts what stands behind "--", the command to run, into the array `job`.
parse_options() {
    local _known=' dry_run ' _option
    dry_run=''
    while [ "$1" != -- ]; do
        _option=${1%% *}
        _known+="$_option "
        printf -v "$_option" '%s' "${1:$((${#_option} + 1))}"
        shift
    done
    shift
    job=()
    while [ $# -gt 0 ]; do
        case $1 in
            --) shift; job=("$@"); return ;;
            --*)
                _option=${1#--} _option=${_option%%=*} _option=${_option//-/_}
                [[ $_known == *" $_option "* ]] || die "unknown option $1; see --help"
                if [[ $1 == *=* ]]; then
                    printf -v "$_option" '%s' "${1#*=}"
                else
                    printf -v "$_option" 1
                fi
                ;;
            *) die "unexpected argument $1; the command to run stands behind --" ;;
        esac
        shift
    done
}

# need NAME...: every one of these options must be given.
need() {
    local _option
    for _option in "$@"; do
        [ "${!_option}" ] || die "--${_option//_/-}=... is missing"
    done
}

# usage FILE: the comment at the top of a script is its help.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

# The TPU virtual machine's software, by accelerator type.
runtime_version() {
    case $1 in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) die "--type=$1: use v4-N, v5litepod-N, v5p-N or v6e-N" ;;
    esac
}

# on_workers WHICH COMMAND: runs a shell command on all workers of the slice, or on one.
on_workers() {
    run gcloud compute tpus tpu-vm ssh "$name" --project="$project" --zone="$zone" \
        --worker="$1" --quiet --command="$2"
}

# install_workers: copies the committed files to all workers, installs them there, and mounts the
# bucket, if there is one, at ~/bucket.
install_workers() {
    local archive
    archive=$(mktemp -u -t dsr_jax.XXXXXX).tar.gz
    [ "${dry_run:-}" ] && archive=dsr_jax.tar.gz
    run git -C "$repository" archive --format=tar.gz --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:dsr_jax.tar.gz" --project="$project" \
        --zone="$zone" --worker=all --quiet
    [ "${dry_run:-}" ] || rm -f "$archive"
    on_workers all "$install_commands"
    if [ "$bucket" ]; then
        on_workers all "$(mount_commands "$bucket")"
    fi
}

# The machines come with Python 3.10; JAX needs 3.11.
install_commands='set -e
mkdir -p ~/dsr_jax && tar -xzf ~/dsr_jax.tar.gz -C ~/dsr_jax && cd ~/dsr_jax
while sudo fuser -s /var/lib/dpkg/lock-frontend; do sleep 5; done
sudo apt-get -qq update && sudo apt-get -qq install -y python3.11 python3.11-venv
[ -d .venv ] || python3.11 -m venv .venv
.venv/bin/pip install -q --upgrade pip
.venv/bin/pip install -q -e ".[tpu,data,tensorboard]" -c constraints.txt'

mount_commands() {
    cat <<EOF
set -e
if ! command -v gcsfuse > /dev/null; then
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
    sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
fi
mkdir -p ~/bucket && { mountpoint -q ~/bucket || gcsfuse --implicit-dirs $1 ~/bucket; }
EOF
}

# start_job: starts `job` on all workers, apart from the connection. Its output goes to ~/job.log,
# its process to ~/job.pid, its exit status, when it ends, to ~/job.status.
start_job() {
    [ ${#job[@]} -gt 0 ] || die "no command behind --, as in: -- python -m dsr_jax.train --config=..."
    # shellcheck disable=SC2088,SC2016 # both are for the worker's shell
    local words inner home='=\~/' expanded='=$HOME/'
    words=$(printf '%q ' "${job[@]}")
    # ~ is each worker's own home, also behind --workdir=, where a shell would leave it.
    words=${words//"$home"/"$expanded"}
    inner="${words}& echo \$! > ~/job.pid; wait \$!; echo \$? > ~/job.status"
    on_workers all "cd ~/dsr_jax && rm -f ~/job.status && export PATH=\$PWD/.venv/bin:\$PATH && \
(nohup setsid bash -c $(printf '%q' "$inner") >> ~/job.log 2>&1 < /dev/null &) && sleep 1"
}

# Prints "absent", "running", "lost" (no such process, and no exit status) or the exit status.
# shellcheck disable=SC2016,SC2034 # expanded on the worker; used by who sources this
job_state_command='if [ -f ~/job.status ]; then cat ~/job.status
elif [ ! -f ~/job.pid ]; then echo absent
elif kill -0 "$(cat ~/job.pid)" 2> /dev/null; then echo running; else echo lost; fi'
