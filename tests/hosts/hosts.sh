#!/usr/bin/env bash
# Several hosts on this one machine, for tests: each has its own network, hostname, IPC, /dev/shm,
# /etc/hosts and TMPDIR; files and process ids are shared. Needs root, iproute2 and util-linux.
#
#   hosts.sh up N [RATE [DELAY]]   make hosts t0, t1, ...; RATE such as 1gbit, or none;
#                                  DELAY one way, such as 1ms (takes python3 and /dev/net/tun)
#   hosts.sh run HOST COMMAND...   run it on HOST, in this folder and environment
#   hosts.sh rate HOST RATE        limit what HOST sends, and what it receives (none: no limit)
#   hosts.sh loss HOST PERCENT     drop this share of the packets that HOST sends
#   hosts.sh cut|heal HOST         pull the cable out of HOST, and plug it in again
#   hosts.sh kill HOST             kill -9 all that runs on HOST: peers see closed connections
#   hosts.sh crash HOST            cut, then kill: peers see silence; heal brings HOST back
#   hosts.sh pids HOST             list what runs there
#   hosts.sh down                  kill everything and leave nothing
#   hosts.sh guard N [RATE [DELAY]]    up, print "up", wait for the end of standard input, down
#
# For example, ranks on two hosts whose link is one of 1 Gbit/s:
#
#   tests/hosts/hosts.sh up 2 1gbit
#   tests/hosts/hosts.sh run t0 mpirun --host t0:2,t1:2 --bind-to none -x PATH python train.py
#   tests/hosts/hosts.sh down
#
# Launchers need no options for it: `run` puts a stand-in for ssh on PATH. What belongs to a set of
# hosts lies in the folder $HOSTS_DIR, by default /tmp/hosts-0 for root, and no interface shows in
# the machine's own network: with different folders, several sets are up at once. Keep its name
# short, since paths of sockets are limited to 107 bytes.
set -u
SELF=$(readlink -f "$0")
HOSTS_DIR=$(realpath -m "${HOSTS_DIR:-/tmp/hosts-$UID}")
NET=${HOSTS_NET:-10.78.0} PREFIX=${HOSTS_PREFIX:-t}
PATH=$PATH:/usr/sbin:/sbin # of ip and tc, where a login put none there
export HOSTS_DIR

die() {
    echo "hosts.sh: $*" >&2
    exit 1
}

# pid_of HOST: the process that holds its namespaces. Known by its name too, as numbers come again.
pid_of() {
    local pid
    pid=$(cat "$HOSTS_DIR/$1/pid" 2> /dev/null) || return 1
    grep -qzxF "$HOSTS_DIR/$1" "/proc/$pid/cmdline" 2> /dev/null && echo "$pid"
}

# on HOST COMMAND...: in its network alone. The switch between the hosts is one too: sw.
on() {
    local pid
    pid=$(pid_of "$1") || die "no host $1"
    nsenter -t "$pid" -n -- "${@:2}"
}

# port HOST: its port on the switch
port() { echo "p${1#"$PREFIX"}"; }

# hold HOST: start the process that holds its namespaces, asleep
hold() {
    local folder=$HOSTS_DIR/$1 i
    mkdir -p "$folder/tmp"
    folder=$folder names=$HOSTS_DIR/etc_hosts setsid unshare -n -u -i -m bash -euc '
        mount -t tmpfs tmpfs /dev/shm
        mount --bind "$names" /etc/hosts
        hostname "${folder##*/}"
        for file in /proc/sys/net/ipv6/conf/{all,default}/disable_ipv6; do
            if [[ -e $file ]]; then echo 1 > "$file"; fi
        done
        ip link set lo up
        echo $$ > "$folder/pid"
        exec -a "$folder" sleep infinity' < /dev/null > "$folder/log" 2>&1 &
    disown # or bash says "Killed" in the end
    for ((i = 0; i < 1000; i++)); do
        pid_of "$1" > /dev/null && return
        sleep 0.005
    done
    die "host $1 did not start: $(cat "$folder/log")"
}

up() {
    local n=$1 rate=${2:-none} delay=${3:-0} i
    [[ $UID == 0 ]] || die "this takes root"
    down
    mkdir -p "$HOSTS_DIR/bin" || die "cannot make $HOSTS_DIR"
    echo 127.0.0.1 localhost > "$HOSTS_DIR/etc_hosts"
    for ((i = 0; i < n; i++)); do echo "$NET.$((i + 1)) $PREFIX$i"; done >> "$HOSTS_DIR/etc_hosts"
    printf '#!/bin/bash\nHOSTS_DIR=%q exec bash %q ssh "$@"\n' "$HOSTS_DIR" "$SELF" > "$HOSTS_DIR/bin/ssh"
    chmod +x "$HOSTS_DIR/bin/ssh"
    for i in sw $(seq -f "$PREFIX%g" 0 $((n - 1))); do hold "$i"; done
    on sw ip link add br0 up type bridge forward_delay 0 || die "no bridge"
    if [[ $delay == 0 ]]; then
        for ((i = 0; i < n; i++)); do
            on sw ip link add "p$i" type veth peer name eth0 netns "$(pid_of "$PREFIX$i")" ||
                die "no link"
        done
    else
        delay_all "$delay" $(for ((i = 0; i < n; i++)); do pid_of "$PREFIX$i"; done)
    fi
    for ((i = 0; i < n; i++)); do
        on sw ip link set "p$i" master br0 up
        on "$PREFIX$i" ip addr add "$NET.$((i + 1))/24" dev eth0
        on "$PREFIX$i" ip link set eth0 up
        rate "$PREFIX$i" "$rate" || die "no rate $rate"
    done
    for ((i = 0; i < n; i++)); do
        until on "$PREFIX$i" ip -br link show eth0 | grep -q LOWER_UP; do sleep 0.01; done
    done
}

# delay_all DELAY PIDS...: not every kernel has a delay (netem), so a process carries the packets
delay_all() {
    local log=$HOSTS_DIR/delay.log i
    on sw python3 "${SELF%/*}/delay.py" "$@" < /dev/null > "$log" 2>&1 &
    disown
    for ((i = 0; i < 2000; i++)); do
        grep -qx ready "$log" 2> /dev/null && return
        sleep 0.005
    done
    die "no delay: $(cat "$log")"
}

rate() {
    shape "$1" eth0 "$2" &&
        shape sw "$(port "$1")" "$2"
}

# shape HOST DEVICE RATE. The burst holds a TCP segment of 64 KiB: smaller ones would cut it up.
shape() {
    on "$1" tc qdisc del dev "$2" root 2> /dev/null
    [[ $3 == none ]] || on "$1" tc qdisc add dev "$2" root tbf rate "$3" burst 256kb latency 50ms
}

# At the switch: a drop at home the sender's kernel would see, and send again at once. A filter in
# classic BPF: random number (53 0 1: jump if below the threshold) -> 2, to drop; else -1, go on.
loss() {
    local port threshold
    port=$(port "$1")
    on sw tc qdisc del dev "$port" clsact 2> /dev/null
    threshold=$(awk -v p="$2" 'BEGIN { printf "%.0f", p / 100 * 4294967295 }')
    [[ $threshold == 0 ]] && return
    on sw tc qdisc add dev "$port" clsact
    on sw tc filter add dev "$port" ingress bpf da bytecode \
        "4,32 0 0 4294963256,53 0 1 $threshold,6 0 0 4294967295,6 0 0 2"
}

run() {
    local pid
    pid=$(pid_of "$1") || { echo "hosts.sh: no host $1" >&2; exit 255; }
    export TMPDIR=$HOSTS_DIR/$1/tmp PATH=$HOSTS_DIR/bin:${PATH//"$HOSTS_DIR/bin:"/}
    exec nsenter -t "$pid" -n -u -i -m -- env -C "$PWD" "${@:2}"
}

# ssh [OPTIONS] [USER@]HOST COMMAND...: what launchers call. As with the real one, COMMAND gets a
# fresh environment and a shell, and the client hangs while HOST is silent.
ssh() {
    local host status
    while [[ ${1:-} == -* ]]; do
        [[ $1 =~ ^-[bcDEeFIiJLlmOopQRSWw]$ ]] && shift # its value
        shift
    done
    host=${1##*@}
    shift
    [[ $host == "$NET".* ]] && host=$PREFIX$((${host##*.} - 1))
    if [[ -e $HOSTS_DIR/$host/cut ]] || ! pid_of "$host" > /dev/null; then
        echo "ssh: connect to host $host port 22: No route to host" >&2
        exit 255
    fi
    exec 3>&2 2> /dev/null # this shell itself says "Killed"
    (
        cd
        exec env -i HOME="$HOME" USER="$(id -un)" LOGNAME="$(id -un)" SHELL=/bin/bash \
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            HOSTS_DIR="$HOSTS_DIR" HOSTS_NET="$NET" HOSTS_PREFIX="$PREFIX" \
            setsid --wait bash "$SELF" run "$host" bash -c "$*" 2>&3 3>&- # as sshd does it
    )
    status=$?
    while [[ -e $HOSTS_DIR/$host/cut ]]; do sleep 0.2; done
    exit $((status > 128 ? 255 : status))
}

# Whatever is in its network, but for the process that holds it.
pids() {
    local pid net
    pid=$(pid_of "$1") || return 0
    net=$(readlink "/proc/$pid/ns/net")
    find /proc/[0-9]*/ns/net -maxdepth 0 -printf '%p %l\n' 2> /dev/null |
        awk -F'[/ ]' -v net="$net" -v holder="$pid" '$NF == net && $3 != holder { print $3 }'
}

# Stops all before it kills any: so nobody reports the death of another, or starts a new process.
kill_all() {
    local found known='' i
    for ((i = 0; i < 50; i++)); do
        found=$(pids "$1")
        [[ -z $found ]] && return
        if [[ $found == "$known" ]]; then
            kill -KILL $found 2> /dev/null
            sleep 0.02
        else
            kill -STOP $found 2> /dev/null
            known=$found
        fi
    done
    die "cannot kill on $1: $(pids "$1")"
}

# The cable is pulled at the switch. To take the port down would do, but after "up" the kernel may
# take a second to notice, in which connections fail.
cut() {
    touch "$HOSTS_DIR/$1/cut"
    on sw ip link set "$(port "$1")" nomaster
}
heal() {
    on sw ip link set "$(port "$1")" master br0
    rm -f "$HOSTS_DIR/$1/cut"
}

# Networks and mounts go with the last process in them.
down() {
    local host pid
    for host in "$HOSTS_DIR"/*/; do
        host=$(basename "$host")
        pid=$(pid_of "$host") || continue
        kill_all "$host"
        kill -KILL "$pid"
        while pid_of "$host" > /dev/null; do sleep 0.005; done
    done
    [[ ! -e $HOSTS_DIR/etc_hosts ]] || rm -rf "$HOSTS_DIR"
}

guard() {
    trap down EXIT
    up "$@"
    echo up
    cat > /dev/null
}

if [[ $# -eq 0 ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$SELF"
    exit 2
fi
case $1 in
    up | run | ssh | rate | loss | cut | heal | pids | down | guard) "$@" ;;
    kill) kill_all "$2" ;;
    crash) cut "$2" && kill_all "$2" ;;
    *) die "unknown command $1" ;;
esac
