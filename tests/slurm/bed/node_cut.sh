#!/bin/bash
# node_cut.sh nowhere|island1|island2 NODE...  - plug nodes into another bridge; nothing is killed.
#   nowhere  no bridge at all: the carrier stays, every packet vanishes, nothing is refused
#   islandI  nodes of one island still reach each other
# Prints the time of it.
. "$(dirname "$0")/namespaces.sh"
place="master $1"
[ "$1" = nowhere ] && place=nomaster
shift
echo "$EPOCHREALTIME"
for node in "$@"; do echo "link set v-$(name "$node") $place"; done | on_switch ip -batch -
