#!/usr/bin/env bash
# A cluster of nodes inside one Linux machine, for tests of launchers: own addresses, host names, process numbers, /dev/shm.
#
# Each node is a process namespace, a network namespace with one link to a bridge, a host name and a mount namespace.
# node0 is the login node (10.77.0.10) and holds the bridge; node1..nodeN are 10.77.0.11 and so on. Nothing of the machine's own
# network changes. The file system is shared, as on a cluster with NFS; `mount` inside `enter` gives a node its own view.
# Needs root, iproute2, util-linux; nftables for `oneway` and `slow`; openssh-server for `ssh-up`.
#
#   network.sh up DIR N              make the nodes; DIR holds all state: short, such as $(mktemp -d /tmp/c.XXXX)
#   network.sh enter DIR I CMD...    run a command on node I, in the present directory
#   network.sh ssh-up DIR            sshd on node1..N; then: ssh -F DIR/ssh_config node1
#   network.sh ray-up DIR PYBIN [C]  Ray head on node1, workers on node2..N, C CPUs each (2); PYBIN: folder of `ray`
#                                          (programs through `enter` find its token; DIR/ray_token, mode token)
#   network.sh ray-node DIR PYBIN I [C]   one more worker (a node that comes back)
#   network.sh cut|heal DIR I        take the link of node I down, up
#   network.sh oneway DIR I in|out   drop what comes in (or goes out) at node I: a half-open connection; heal ends it
#   network.sh slow DIR I RATE LOSS  node I sends RATE at most, such as 20mbit, and loses LOSS of 1,000 packets; heal ends it
#   network.sh lose DIR I            power failure: link down, then every process of the node killed
#   network.sh add DIR I             make node I (again)
#   network.sh down DIR              end all nodes and what runs on them
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
verb=${1:?verb}; DIR=$(realpath -m "${2:?directory}"); shift 2
# Ray 2.60's head asks for a token, which workers and drivers send only in this mode: set both for programs at the cluster too.
# Ray lets everything else on the machine go first (15), and ends workers where its memory is nearly full: other work may be the reason.
# A raylet that shares two cores with other tests takes more than Ray's 60 s to register.
export RAY_raylet_start_wait_time_s=600 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$DIR/ray_token RAY_worker_niceness=0 RAY_memory_monitor_refresh_ms=0
address() { echo "10.77.0.$((10 + $1))"; }
pid_of() { cat "$DIR/node$1.pid"; }
enter() { local i=$1; shift; nsenter --target "$(pid_of "$i")" --net --uts --mount --pid --wd="$PWD" -- "$@"; }

add() {  # $1: number of the node
  local i=$1 init
  rm -f "$DIR/node$i.ready"
  # Process 1 of the node is a shell, which reaps orphans; when it is killed the kernel kills the whole node.
  setsid unshare --net --uts --mount --pid --fork --mount-proc --propagation private bash -c '
    hostname "node$1"; ip link set lo up; mount -t tmpfs -o size=2g tmpfs /dev/shm
    mount --bind "$2/hosts" /etc/hosts; : > "$2/node$1.ready"
    trap "" HUP INT; while :; do sleep 3600 & wait; done' node "$i" "$DIR" </dev/null >>"$DIR/node$i.out" 2>&1 &
  init=$!
  until [ -e "$DIR/node$i.ready" ]; do sleep 0.05; done
  # setsid may fork: the shell is the child of unshare, whichever process that is.
  pgrep -P "$init" >"$DIR/node$i.pid"
  if [ "$i" = 0 ]; then
    enter 0 ip link add br0 type bridge; enter 0 ip addr add "$(address 0)/24" dev br0; enter 0 ip link set br0 up
  else
    # Between the nodes' networks and never in the machine's own, where two clusters at a time would take each other's names.
    nsenter --target "$(pid_of "$i")" --net ip link add eth0 type veth peer name "nb$i" netns "$(pid_of 0)"
    enter 0 ip link set "nb$i" master br0 up
    enter "$i" ip addr add "$(address "$i")/24" dev eth0; enter "$i" ip link set eth0 up
  fi
}

kill_node() { local pid; pid=$(pid_of "$1" 2>/dev/null) || return 0; kill -9 "$pid" 2>/dev/null || true; rm -f "$DIR/node$1.pid"; }

case $verb in
up)
  n=${1:?number of nodes}; mkdir -p "$DIR"; echo "$n" >"$DIR/count"; echo "127.0.0.1 localhost" >"$DIR/hosts"
  for i in $(seq 0 "$n"); do echo "$(address "$i") node$i" >>"$DIR/hosts"; done
  for i in $(seq 0 "$n"); do add "$i"; done ;;
add) add "$1" ;;
enter) enter "$@" ;;
ssh-up)
  [ -e "$DIR/ssh_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh_key"
  [ -e "$DIR/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/host_key"
  printf '%s\n' "HostKey $DIR/host_key" "AuthorizedKeysFile $DIR/ssh_key.pub" 'StrictModes no' 'UsePAM no' \
    'PermitRootLogin prohibit-password' 'PasswordAuthentication no' >"$DIR/sshd_config"
  printf '%s\n' 'Host node*' "  IdentityFile $DIR/ssh_key" "  UserKnownHostsFile $DIR/known_hosts" '  StrictHostKeyChecking accept-new' \
    '  LogLevel ERROR' >"$DIR/ssh_config"
  mkdir -p /run/sshd
  for i in $(seq 1 "$(cat "$DIR/count")"); do enter "$i" /usr/sbin/sshd -f "$DIR/sshd_config" -o "PidFile=$DIR/sshd$i.pid"; done ;;
ray-up)
  bin=${1:?folder of ray}; cpus=${2:-2}
  [ -e "$DIR/ray_token" ] || (umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$DIR/ray_token")
  enter 1 "$bin/ray" start --head --node-ip-address "$(address 1)" --port 6379 --num-cpus "$cpus" --object-store-memory 100000000 \
    --include-dashboard=false --disable-usage-stats --temp-dir "$DIR/r1"
  for i in $(seq 2 "$(cat "$DIR/count")"); do "$0" ray-node "$DIR" "$bin" "$i" "$cpus"; done ;;
ray-node)
  bin=$1; i=$2
  enter "$i" "$bin/ray" start --address "$(address 1):6379" --node-ip-address "$(address "$i")" --num-cpus "${3:-2}" \
    --object-store-memory 100000000 --disable-usage-stats ;;
cut) enter 0 ip link set "nb$1" down ;;
heal)
  enter 0 ip link set "nb$1" up; enter "$1" tc qdisc del dev eth0 root 2>/dev/null || true
  for table in oneway lossy; do enter "$1" nft delete table inet $table 2>/dev/null || true; done ;;
oneway)
  [ "$2" = in ] && hook=input || hook=output
  enter "$1" nft -f - <<<"table inet oneway { chain c { type filter hook $hook priority 0; $([ "$2" = in ] && echo iifname || echo oifname) eth0 drop; }; }" ;;
slow)  # not netem, which not every kernel has
  enter "$1" tc qdisc replace dev eth0 root tbf rate "$2" burst 64kb latency 400ms
  enter "$1" nft -f - <<<"table inet lossy { chain c { type filter hook input priority 0; iifname eth0 numgen random mod 1000 < $3 drop; }; }" ;;
lose) enter 0 ip link set "nb$1" down; kill_node "$1"; enter 0 ip link del "nb$1" 2>/dev/null || true ;;
down) for i in $(seq "$(cat "$DIR/count")" -1 0); do kill_node "$i"; done ;;
*) sed -n '2,/^set/p' "$0" >&2; exit 2 ;;
esac
