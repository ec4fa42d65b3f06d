#!/bin/bash
# cluster_down.sh  - end every process of the bed and remove its directory.
# Signals only the recorded first processes of our own namespaces; the kernel ends what is inside.
. "$(dirname "$0")/namespaces.sh"
[ -d "$RUN" ] || exit 0
pids=()
for file in "$RUN"/*.pid; do
  pid=$(init_of "$(basename "$file" .pid)") && kill -KILL "$pid" && pids+=("$pid")
done
for pid in ${pids[@]+"${pids[@]}"}; do await 10 has_ended "$pid"; done
rm -rf "${BED_DIR:?}"
