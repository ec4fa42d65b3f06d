#!/bin/bash
# node_heal.sh [--no-wait] NODE...  - undo whatever was done to nodes, and wait for SLURM to see it.
# A node that runs goes on and is plugged in again; a dead one boots anew, with an empty disk.
# Prints the time at which the last node was plugged in.
. "$(dirname "$0")/namespaces.sh"
wait=1
[ "${1:-}" = --no-wait ] && { wait=; shift; }
nodes=()
for node in "$@"; do nodes+=("$(name "$node")"); done
[ ${#nodes[@]} -gt 0 ] || { echo "$EPOCHREALTIME"; exit; }
runs_slurmd() { on_node "$1" sh -c 'kill -0 "$(cat /run/slurmd.pid)"' 2>/dev/null; }
for node in "${nodes[@]}"; do
  if init_of "$node" >/dev/null; then
    on_node "$node" sh -c 'kill -CONT -1'
    on_switch ip link set "v-$node" master "$(bridge_of "$node")" up || die "cannot plug $node in"
    runs_slurmd "$node" || start_slurmd "$node"
  else
    on_switch ip link del "v-$node" 2>/dev/null
    boot "$node"
    booted "$node"
    plug "$node"
    start_slurmd "$node" -b  # tells slurmctld of the reboot
  fi
done
echo "$EPOCHREALTIME"
for node in "${nodes[@]}"; do
  case $(on_node ctl sinfo -h -p main -n "$node" -o %T) in
  *drain*) on_node ctl scontrol update nodename="$node" state=resume ;;
  esac
done
[ -z "$wait" ] || await 60 up_in_slurm "${nodes[@]}" ||
  die "not back in SLURM: $(on_node ctl sinfo -h -N -o '%N %T' | tr '\n' ' ')"
