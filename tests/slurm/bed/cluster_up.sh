#!/bin/bash
# cluster_up.sh COUNT  - a SLURM cluster of COUNT nodes in BED_DIR, an empty directory.
. "$(dirname "$0")/namespaces.sh"
count=$1
[ "$(id -u)" = 0 ] || die "namespaces of nodes need root"
case $BED_DIR in
/run/* | /dev/* | /proc/* | /sys/* | /etc/*) die "nodes cannot see $BED_DIR: another BED_DIR" ;;
esac
mkdir -p "$BED_DIR" && [ -z "$(ls -A "$BED_DIR")" ] || die "$BED_DIR is not an empty directory"
chmod 755 "$BED_DIR"
mkdir "$BED_DIR"/{etc,log,run,local,state,dev,munge}
bash "$HERE/slurm_conf.sh" "$count" || exit
nodes=(ctl $(seq -f node%g "$count"))

# The switch has no process of its own but a sleep, which is awaited: until the exec of `unshare`
# is through it would name the network of the host.
setsid unshare --net sleep infinity </dev/null >/dev/null 2>&1 &
switch=$!
is_switch() { [ "$(cat /proc/$switch/comm 2>/dev/null)" = sleep ]; }
await 5 is_switch || die "unshare --net: not permitted here"
record switch "$switch"
for bridge in main island1 island2; do
  echo "link add $bridge type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
  echo "link set $bridge up"
done | on_switch ip -batch - || die "cannot make bridges"
for node in "${nodes[@]}"; do boot "$node"; done
for node in "${nodes[@]}"; do booted "$node"; plug "$node"; done

# munged lives in ctl; its socket is on the shared disk, which is as good as one on each node.
head -c 128 /dev/urandom >"$BED_DIR/munge/key"
chmod 400 "$BED_DIR/munge/key"
on_node ctl munged --force --key-file="$BED_DIR/munge/key" --socket="$BED_DIR/munge/socket" \
  --pid-file=/run/munged.pid --log-file="$BED_DIR/log/munged.log" \
  --seed-file="$BED_DIR/munge/seed" 2>/dev/null || die "munged: see $BED_DIR/log/munged.log"
start_slurmctld -c || die "slurmctld: see $BED_DIR/log/slurmctld.log"
answers() { on_node ctl scontrol ping >/dev/null 2>&1; }
await 10 answers || die "slurmctld: see $BED_DIR/log/slurmctld.log"
starting=()
for node in "${nodes[@]:1}"; do start_slurmd "$node" & starting+=($!); done
wait "${starting[@]}"
await 20 up_in_slurm "${nodes[@]:1}" || die "$(on_node ctl sinfo -N; echo "see $BED_DIR/log")"
