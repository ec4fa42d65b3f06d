#!/bin/bash
# node_freeze.sh NODE  - every process of a node stops at once; its kernel still acknowledges.
# From inside the node -1 means all processes but the first; a stopped one forks no new ones.
# Prints the time of it.
. "$(dirname "$0")/namespaces.sh"
echo "$EPOCHREALTIME"
on_node "$(name "$1")" sh -c 'kill -STOP -1'
