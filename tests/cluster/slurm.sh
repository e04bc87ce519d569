#!/usr/bin/env bash
# A real Slurm cluster (munged, slurmctld, a slurmd on each of N nodes) inside one Linux machine, for tests of launchers.
#
# The nodes are those of network.sh next to this file: own addresses, host names and process numbers. slurmctld and munged run
# on node0, the login node. Own key, own sockets, own configuration in DIR: nothing in /etc is used. Tried with Debian's
# slurm-wlm 24.11 and munge. Needs root.
#
#   slurm.sh up DIR N [CPUS] [MB] [accounts]
#                                   bring it up; DIR short, such as $(mktemp -d /tmp/c.XXXX). CPUS (2) and MB (3000) of a node;
#                                   with `accounts` Slurm asks for accounts and QOS, which slurmdbd keeps in a MariaDB on node0
#   slurm.sh login DIR CMD...       run a command on the login node, with Slurm's programs at this cluster
#   slurm.sh node DIR I             start slurmd on node I (again)
#   slurm.sh controller DIR         start slurmctld (again)
#   slurm.sh down DIR               end everything
# Faults: network.sh cut, lose, slow ... on the same DIR; `login DIR scancel ...`, `scontrol update nodename=...`.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
net="$(dirname "$(realpath "$0")")/network.sh"
verb=${1:?verb}; DIR=$(realpath -m "${2:?directory}"); shift 2
export SLURM_CONF=$DIR/slurm.conf
until_ok() { for _ in $(seq 120); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done; echo "never succeeded: $*" >&2; return 1; }
count_idle() { [ "$("$net" enter "$DIR" 0 sinfo -h -t idle -o %D)" = "$1" ]; }
start_accounts() {
  cat >>"$SLURM_CONF" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=node0
AccountingStoragePass=$DIR/munge/socket
AccountingStorageEnforce=associations,limits,qos
CONF
  local sql=(--no-defaults --socket="$DIR/db/socket" --user=root)
  mariadb-install-db --no-defaults --datadir="$DIR/db" --user=root --auth-root-authentication-method=normal --skip-test-db
  "$net" enter "$DIR" 0 setsid mariadbd "${sql[@]}" --datadir="$DIR/db" --pid-file="$DIR/db/pid" --bind-address=127.0.0.1 \
    --skip-name-resolve </dev/null >"$DIR/db.log" 2>&1 &
  (umask 077; cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
DbdHost=node0
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=root
LogFile=$DIR/slurmdbd.log
PidFile=$DIR/slurmdbd.pid
CONF
  )
  # slurmdbd would create its database itself, but cannot read an answer after that (libmariadb 11.8.9).
  until_ok mariadb-admin "${sql[@]}" create slurm_acct_db
  "$net" enter "$DIR" 0 setsid slurmdbd </dev/null >/dev/null 2>&1
  until_ok "$net" enter "$DIR" 0 sacctmgr -i add cluster test
}
start_slurmctld() { "$net" enter "$DIR" 0 setsid slurmctld </dev/null >/dev/null 2>&1; }
start_slurmd() { "$net" enter "$DIR" "$1" setsid slurmd -N "node$1" -L "$DIR/slurmd$1.log" </dev/null >/dev/null 2>&1; }

case $verb in
up)
  n=${1:?number of nodes}; cpus=${2:-2}; mb=${3:-3000}; accounts=${4:-}
  "$net" up "$DIR" "$n"
  mkdir -p "$DIR/state" "$DIR/spool" "$DIR/munge"; chmod 755 "$DIR" "$DIR/munge"
  (umask 077; head -c 128 /dev/urandom >"$DIR/munge/key")
  "$net" enter "$DIR" 0 munged --force --key-file "$DIR/munge/key" --socket "$DIR/munge/socket" --pid-file "$DIR/munge/pid" \
    --log-file "$DIR/munge/log" --seed-file "$DIR/munge/seed"
  echo 'CgroupPlugin=disabled' >"$DIR/cgroup.conf"
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=node0(10.77.0.10)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=20
UnkillableStepTimeout=60
MinJobAge=3600
NodeName=node[1-$n] NodeAddr=10.77.0.[11-$((10 + n))] CPUs=$cpus RealMemory=$mb State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP DefMemPerNode=$mb
CONF
  [ -z "$accounts" ] || start_accounts
  start_slurmctld
  for i in $(seq 1 "$n"); do start_slurmd "$i"; done
  until_ok count_idle "$n"
  "$net" enter "$DIR" 0 sinfo ;;
login) "$net" enter "$DIR" 0 "$@" ;;
node) start_slurmd "$1" ;;
controller) start_slurmctld ;;
down) "$net" down "$DIR" ;;
*) sed -n '2,/^set/p' "$0" >&2; exit 2 ;;
esac
