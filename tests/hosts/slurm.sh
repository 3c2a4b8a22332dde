#!/usr/bin/env bash
# A real SLURM cluster on the hosts of hosts.sh, for tests. Needs root, and Debian's slurm-wlm and
# munge. The last of the hosts controls it, and is where commands are run; the others are nodes of
# 2 cores each. It goes with the hosts: hosts.sh down.
#
#   slurm.sh up N             on t0, t1, ... up to tN, which hosts.sh has brought up
#   slurm.sh run COMMAND...   run it on the host that controls: sbatch, squeue, mpidl submit, ...
#   slurm.sh node HOST        start the node again, after hosts.sh kill HOST
#
# For example:
#
#   tests/hosts/hosts.sh up 3 && tests/hosts/slurm.sh up 2
#   tests/hosts/slurm.sh run mpidl submit --nodes 2 --ranks-per-node 2 train.py
#   tests/hosts/hosts.sh down
set -u
HERE=$(dirname "$(readlink -f "$0")")
HOSTS_DIR=$(realpath -m "${HOSTS_DIR:-/tmp/hosts-$UID}")
FOLDER=$HOSTS_DIR/slurm
HEAD=$(cat "$FOLDER/head" 2> /dev/null)
PATH=$PATH:/usr/sbin:/sbin # of the daemons
export HOSTS_DIR SLURM_CONF=$FOLDER/slurm.conf

on() { "$HERE/hosts.sh" run "$@" < /dev/null; }

# The daemons detach themselves.
node() { on "$1" slurmd -N "$1"; }

# The plug-in for PMIx opens libpmix.so, which Debian has in libpmix-dev alone. Here the nodes, and
# the host where srun starts, see libpmix2 by that name too.
name_pmix() {
    local lib i
    lib=$(dirname "$(readlink -f /usr/lib/*/pmix2/lib/libpmix.so.2)")
    [[ -e $lib/libpmix.so.2 && ! -e $lib/libpmix.so ]] || return
    cp -a "$lib" "$FOLDER/pmix"
    ln -s libpmix.so.2 "$FOLDER/pmix/libpmix.so"
    for ((i = 0; i <= $1; i++)); do on "t$i" mount --bind "$FOLDER/pmix" "$lib"; done
}

# After a requeue a job waits until credentials of the first run have expired: 5 s, not 2 minutes.
up() {
    local n=$1 i
    mkdir -m 755 "$FOLDER" "$FOLDER/state" || exit
    HEAD=t$n
    echo "$HEAD" > "$FOLDER/head"
    name_pmix "$n"
    cat > "$SLURM_CONF" << END
ClusterName=test
SlurmctldHost=$HEAD
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
TmpFS=$HOSTS_DIR/%n/tmp
SlurmctldPidFile=$FOLDER/ctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/ctld.log
SlurmdLogFile=$FOLDER/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
KillWait=3
NodeName=t[0-$((n - 1))] CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    (umask 077 && head -c 64 /dev/urandom > "$FOLDER/munge.key")
    on "$HEAD" munged --force --socket="$FOLDER/munge.socket" --key-file="$FOLDER/munge.key" \
        --log-file="$FOLDER/munge.log" --pid-file="$FOLDER/munge.pid" \
        --seed-file="$FOLDER/munge.seed" || exit
    on "$HEAD" slurmctld || exit
    for ((i = 0; i < n; i++)); do node "t$i" || exit; done
    for ((i = 0; i < 300; i++)); do
        [[ $(on "$HEAD" sinfo -h -t idle -o %D 2> /dev/null) == "$n" ]] && return
        sleep 0.1
    done
    echo "slurm.sh: nodes did not come up:" >&2
    on "$HEAD" sinfo -N -l >&2
    exit 1
}

case ${1:-} in
    up | node) "$@" ;;
    run) exec "$HERE/hosts.sh" run "$HEAD" "${@:2}" ;;
    *)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
