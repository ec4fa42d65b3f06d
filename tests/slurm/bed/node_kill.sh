#!/bin/bash
# node_kill.sh NODE power|crash|slurmd  - take a node away, with its memory and its own disk.
#   power   the cable is dead first, then every process: the others see silence, as after a power
#           cut, a kernel panic or the death of a switch
#   crash   every process is killed with the cable still good: the others get FIN and RST at once
#   slurmd  only slurmd is killed; the tasks of the node live on
# Prints the time of it.
. "$(dirname "$0")/namespaces.sh"
node=$(name "$1")
pid=$(init_of "$node") || die "$node does not run"
echo "$EPOCHREALTIME"
case $2 in
power) on_switch ip link set "v-$node" nomaster ;;  # carrier stays, packets vanish
crash) ;;
slurmd) on_node "$node" sh -c 'kill -KILL "$(cat /run/slurmd.pid)"'; exit ;;
*) die "power, crash or slurmd, not $2" ;;
esac
kill -KILL "$pid"
await 10 has_ended "$pid"
# Sockets of the dead keep their network alive for a while: the cable goes for good, in the case
# of a crash after FIN and RST had the time to leave.
[ "$2" = power ] || sleep 0.1
on_switch ip link del "v-$node" 2>/dev/null
rm -f "$RUN/$node.pid" "$RUN/$node.ready"
