# What the launchers share: options and their checks, shipping the code, a job on TPU VM workers.
# Sourced, not run.
# shellcheck shell=bash

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Options that several launchers have.
name='' project='' zone='' bucket='' type='' dry_run='' job=()

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

note() {
    printf '%s %s\n' "$(date -u +%FT%TZ)" "$*" >&2
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

# parse_options SPEC ... -- ARGUMENTS: sets a variable from each --name=value, and puts what follows
# "--", the command to run, into the array `job`. A SPEC is "name", "name default", or "name?" for a
# flag without a value, which is set to 1.
parse_options() {
    local _known=' ' _flags=' dry_run ' _option _value
    dry_run=''
    while [ "$1" != -- ]; do
        _option=${1%% *} _value=''
        if [[ $_option == *\? ]]; then
            _option=${_option%\?}
            _flags+="$_option "
        else
            _known+="$_option "
            [[ $1 == *' '* ]] && _value=${1#* }
        fi
        printf -v "$_option" '%s' "$_value"
        shift
    done
    shift
    job=()
    while [ $# -gt 0 ]; do
        case $1 in
            --) shift; job=("$@"); return ;;
            --*)
                _option=${1#--} _option=${_option%%=*} _option=${_option//-/_}
                if [[ $_flags == *" $_option "* ]]; then
                    [[ $1 != *=* ]] || die "${1%%=*} takes no value: write ${1%%=*} or leave it out"
                    printf -v "$_option" 1
                elif [[ $_known == *" $_option "* ]]; then
                    [[ $1 == *=* ]] || die "$1 needs a value: write $1=..."
                    printf -v "$_option" '%s' "${1#*=}"
                else
                    die "unknown option $1; see --help"
                fi
                ;;
            *) die "unexpected argument $1; the command to run follows --" ;;
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

need_job() {
    [ ${#job[@]} -gt 0 ] || die "no command after --, as in: -- python -m dsr_jax.train --config=..."
}

# need_counts NAME...: these options must be whole numbers from 1.
need_counts() {
    local _option
    for _option in "$@"; do
        [[ ${!_option} =~ ^[1-9][0-9]{0,5}$ ]] ||
            die "--${_option//_/-}=${!_option}: must be a whole number from 1"
    done
}

# need_place: --name, --project and --zone, as Google Cloud spells them.
need_place() {
    need name project zone
    check_label name 40
    [[ $project =~ ^[a-z][a-z0-9.:-]*[a-z0-9]$ ]] ||
        die "--project=$project: must be a project's id, as in my-project-123"
    [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone=$zone: must be a zone, as in us-west4-a"
}

# check_label OPTION LENGTH: the option's value names a machine, cluster or workload.
check_label() {
    local _value=${!1}
    [[ $_value =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#_value} -le $2 ]] ||
        die "--$1=$_value: must be lower-case letters, digits and -, from a letter to a letter or" \
            "digit, at most $2 characters"
}

check_bucket() {
    [[ $bucket != gs://* ]] || die "--bucket=$bucket: write the name alone, without gs://"
    [[ $bucket =~ ^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$ ]] ||
        die "--bucket=$bucket: must be a bucket's name alone, as in my-bucket (no path behind it)"
}

# check_type: --type is an accelerator type that exists.
check_type() {
    local _size=${type##*-} _good=''
    [[ $_size =~ ^[1-9][0-9]{0,4}$ ]] || _size=0
    case $type in
        v5litepod-* | v6e-*) [[ " 1 4 8 16 32 64 128 256 " != *" $_size "* ]] || _good=1 ;;
        v4-* | v5p-*)
            # Two cores a chip; above 32 chips the slices are made of cubes of 64.
            [[ " 8 16 32 64 " != *" $_size "* ]] || _good=1
            [ "$_size" -eq 0 ] || [ $((_size % 128)) -ne 0 ] || [ "$_size" -gt 12288 ] || _good=1
            ;;
        *) die "--type=$type: use v4-N, v5litepod-N, v5p-N or v6e-N" ;;
    esac
    [ "$_good" ] || die "--type=$type: there is no such slice. v5litepod-N and v6e-N have 1, 4, 8," \
        "16, 32, 64, 128 or 256 chips; the N of v4-N and v5p-N is 8, 16, 32, 64 or a multiple of 128"
}

# job_option NAME: prints the value of --NAME=value or --NAME value in the job's command.
job_option() {
    local _index
    for ((_index = 0; _index < ${#job[@]}; _index++)); do
        case ${job[_index]} in
            "--$1="*) printf '%s\n' "${job[_index]#*=}"; return ;;
            "--$1") printf '%s\n' "${job[_index + 1]:-}"; return ;;
        esac
    done
}

# check_paths FOLDER: the job names the bucket as its machines see it, not as this machine would.
check_paths() {
    local _word
    # shellcheck disable=SC2016 # $HOME itself
    for _word in "${job[@]}"; do
        case $_word in
            *gs://*) die "$_word: the bucket is mounted; write $1/... in place of gs://BUCKET/..." ;;
            *'$HOME'*) die "$_word: nothing replaces \$HOME there; write $1/... behind the =" ;;
            *"${HOME%/}/bucket"*)
                die "$_word: this machine's home folder; write $1/... behind the =, so that" \
                    "the shell here does not replace it"
                ;;
        esac
    done
}

# check_workdir FOLDER: the run's folder survives its machines.
check_workdir() {
    local _workdir
    _workdir=$(job_option workdir)
    case $_workdir in
        '') die "the command has no --workdir=$1/..., the folder in the bucket to continue from" ;;
        */../* | */..) die "--workdir=$_workdir: write it without .." ;;
        "$1"/?*) ;;
        *)
            die "--workdir=$_workdir is not in the bucket, and would be lost with the machine;" \
                "write --workdir=$1/..."
            ;;
    esac
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
    esac
}

# check_checkout: there is a commit to ship.
check_checkout() {
    [ ! "${dry_run:-}" ] || return 0
    git -C "$repository" rev-parse --verify --quiet HEAD > /dev/null ||
        die "$repository is not a git checkout with a commit; clone the repository"
    [ -z "$(git -C "$repository" status --porcelain --untracked-files=no)" ] ||
        note "uncommitted changes in $repository are not shipped; commit them first"
}

# make_archive FILE: packs the last commit; git writes the commit's name into it, which the run
# records (dsr_jax/core/provenance.py).
make_archive() {
    run git -C "$repository" archive --format=tar.gz --output="$1" HEAD
}

# on_workers WHICH COMMAND: runs a shell command on all workers of the slice, or on one.
on_workers() {
    run gcloud compute tpus tpu-vm ssh "$name" --project="$project" --zone="$zone" \
        --worker="$1" --quiet --command="$2"
}

# install_workers: copies the committed files to all workers, and installs them there.
install_workers() {
    local folder=. status=0
    [ "${dry_run:-}" ] || folder=$(mktemp -d)
    make_archive "$folder/dsr_jax.tar.gz" &&
        run gcloud compute tpus tpu-vm scp "$folder/dsr_jax.tar.gz" "$name:dsr_jax.tar.gz" \
            --project="$project" --zone="$zone" --worker=all --quiet &&
        on_workers all "$install_commands" || status=$?
    [ "${dry_run:-}" ] || rm -rf "$folder"
    return "$status"
}

# mount_bucket: mounts the bucket, if there is one, at ~/bucket on all workers.
mount_bucket() {
    [ ! "$bucket" ] || on_workers all "$(mount_commands "$bucket")"
}

# The machines come with Python 3.10; JAX needs 3.11. Files of an earlier commit do not stay.
install_commands='set -e
mkdir -p ~/dsr_jax && cd ~/dsr_jax
find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
tar -xzf ~/dsr_jax.tar.gz
while sudo fuser -s /var/lib/dpkg/lock-frontend; do sleep 5; done
sudo apt-get -qq update && sudo apt-get -qq install -y python3.11 python3.11-venv
[ -d .venv ] || python3.11 -m venv .venv
.venv/bin/pip install -q --upgrade pip
.venv/bin/pip install -q -e ".[tpu,data,tensorboard]" -c constraints.txt'

# Checkpoints are committed by renaming their folder, which Cloud Storage FUSE does in buckets with
# a hierarchical namespace only.
mount_commands() {
    cat <<EOF
set -e
if ! command -v gcsfuse > /dev/null; then
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
    sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
fi
mkdir -p ~/bucket && { mountpoint -q ~/bucket || gcsfuse --implicit-dirs $1 ~/bucket; }
probe=~/bucket/.rename_probe.\$(hostname).\$\$
mkdir -p \$probe/a && touch \$probe/a/b
if mv \$probe \$probe.moved; then rm -r \$probe.moved; else
    rm -r \$probe
    echo "error: folders of gs://$1 cannot be renamed, so that checkpoints cannot be saved there; make a bucket with --enable-hierarchical-namespace" >&2
    exit 1
fi
EOF
}

# job_words: prints the job's command for a worker's shell, where ~ is the worker's own home, also
# behind --workdir=, where a shell would leave it.
job_words() {
    # shellcheck disable=SC2088,SC2016 # both are for the worker's shell
    local words behind='=\~/' first=' \~/'
    words=" $(printf '%q ' "${job[@]}")"
    # shellcheck disable=SC2016
    words=${words//"$behind"/'=$HOME/'}
    # shellcheck disable=SC2016
    words=${words//"$first"/' $HOME/'}
    printf '%s\n' "${words# }"
}

# start_job: starts `job` on all workers, detached from the connection. Its output goes to ~/job.log,
# the command itself to ~/job.command, its process to ~/job.pid, the machine's start to ~/job.boot,
# and its exit status, when it ends, to ~/job.status.
start_job() {
    local words inner
    words=$(job_words)
    inner="${words}& echo \$! > ~/job.pid; wait \$!; echo \$? > ~/job.status"
    on_workers all "$job_runs_command
if job_runs; then echo 'error: a job runs already; stop it first' >&2; exit 1; fi
cd ~/dsr_jax && rm -f ~/job.status && cp /proc/sys/kernel/random/boot_id ~/job.boot && \
printf '%s\\n' $(printf '%q' "$words") > ~/job.command && export PATH=\$PWD/.venv/bin:\$PATH && \
(nohup setsid bash -c $(printf '%q' "$inner") >> ~/job.log 2>&1 < /dev/null &) && sleep 1"
}

# After a restart of the machine another process may have the job's number.
# shellcheck disable=SC2016 # expanded on the worker
job_runs_command='job_runs() {
    [ ! -f ~/job.status ] && [ -f ~/job.pid ] &&
        [ "$(cat ~/job.boot)" = "$(cat /proc/sys/kernel/random/boot_id)" ] &&
        kill -0 "$(cat ~/job.pid)" 2> /dev/null
}'

# Prints the worker's name and "absent", "running", "lost" (no such process, and no exit status) or
# the exit status.
# shellcheck disable=SC2016,SC2034 # expanded on the worker; used by who sources this
job_state_command="$job_runs_command"'
if [ -f ~/job.status ]; then state=$(cat ~/job.status)
elif [ ! -f ~/job.pid ]; then state=absent
elif job_runs; then state=running; else state=lost; fi
echo "$(hostname) $state"'

# Ends what the job left on a worker, so that it can be started again.
# shellcheck disable=SC2016,SC2034 # expanded on the worker; used by who sources this
job_kill_command="$job_runs_command"'
if job_runs; then kill -KILL -- "-$(ps -o pgid= -p "$(cat ~/job.pid)" | tr -d " ")"; fi'
