# Sourced by every script of the bed: names, the namespaces of a node, and its cable.
#
# A bed is one real SLURM cluster on this machine. Each of its nodes is a set of Linux namespaces
# (net, uts, ipc, pid, mount) with a cable to a switch:
#
#     switch   a network namespace with bridges: main, and islands for partitions
#     ctl      login and controller node, 10.77.0.254: slurmctld, munged; sbatch is called here
#     nodeK    10.77.0.K: slurmd
#
# Process 1 of a node is node_init.sh. One SIGKILL to it makes the kernel kill the whole node, and
# when a node is gone its namespaces and cables are too: nothing is ever put into /run/netns or
# into the network of the host, so beds of different BED_DIR run side by side.
#
#   BED_DIR   directory of the bed; all nodes see it, and /tmp, as their shared disk
#   BED_CPUS  processors that a node pretends to have (8)
#   BED_GPUS  GPUs that a node pretends to have (0)
set -u
: "${BED_DIR:?directory of the bed}"
BED_CPUS=${BED_CPUS:-8} BED_GPUS=${BED_GPUS:-0}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RUN=$BED_DIR/run
DAEMON=(env -i PATH="$PATH" HOME=/root SLURM_CONF=/etc/slurm/slurm.conf)

die() { echo "${0##*/}: $*" >&2; exit 1; }
name() { case $1 in ctl | switch | node*) echo "$1" ;; *) echo "node$1" ;; esac; }  # 3 -> node3
address() { case $1 in ctl) echo 10.77.0.254 ;; *) echo "10.77.0.${1#node}" ;; esac; }

# Wait until the command is true, SECONDS at most.
await() {
  local ticks=$(($1 * 50)); shift
  until "$@"; do [ $((ticks -= 1)) -gt 0 ] || return 1; sleep 0.02; done
}

# Number of the process of the host that is process 1 of a node; fails where it does not run. The
# recorded start time guards against numbers that went to somebody else's process.
started() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; set -- $s
  [ "$1" != Z ] && echo "${20}"; }
init_of() { local pid start; read -r pid start 2>/dev/null <"$RUN/$1.pid" || return 1
  [ "$(started "$pid")" = "$start" ] && echo "$pid"; }
record() { echo "$2 $(started "$2")" >"$RUN/$1.pid.new" && mv "$RUN/$1.pid.new" "$RUN/$1.pid"; }
has_ended() { ! started "$1" >/dev/null; }

on_switch() { nsenter -t "$(init_of switch)" -n "$@"; }
on_node() { local node=$1 pid; shift; pid=$(init_of "$node") || die "$node does not run"
  nsenter -t "$pid" -m -u -i -n -p "$@"; }

# Create the namespaces of a node; its script writes NODE.ready when they are furnished.
boot() {
  rm -f "$RUN/$1.ready"
  setsid unshare --net --uts --ipc --pid --mount --fork bash "$HERE/node_init.sh" "$BED_DIR" "$1" \
    </dev/null >"$BED_DIR/log/$1.init.log" 2>&1 &
}
booted() { await 10 test -e "$RUN/$1.ready" || die "$1: see $BED_DIR/log/$1.init.log"; }

# Plug a node into its bridge (a remote site's after wan_up.sh) and give it its addresses. That of
# the card does not change with a reboot: others would send to the old one for half a minute.
bridge_of() { cat "$RUN/$1.bridge" 2>/dev/null || echo main; }
plug() {
  local pid card ip; pid=$(init_of "$1") ip=$(address "$1")
  card=$(printf 02:00:00:00:00:%02x "${ip##*.}")
  on_switch ip -batch - <<IP || die "cannot plug $1 in"
link add v-$1 type veth peer name eth0 address $card netns $pid
link set v-$1 master $(bridge_of "$1") up
IP
  nsenter -t "$pid" -n ip -batch - <<IP
link set lo up
address add $ip/24 brd + dev eth0
link set eth0 up
IP
}

start_slurmctld() { on_node ctl "${DAEMON[@]}" slurmctld "$@"; }
start_slurmd() { local node=$1; shift; on_node "$node" "${DAEMON[@]}" slurmd "$@"; }
up_in_slurm() {  # every given node, as slurmctld sees it
  local state node
  for node in "$@"; do
    state=$(on_node ctl timeout 5 sinfo -h -p main -n "$node" -o %T 2>/dev/null)
    case $state in idle | mixed | allocated | completing | planned) ;; *) return 1 ;; esac
  done
}
