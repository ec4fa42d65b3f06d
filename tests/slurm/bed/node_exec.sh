#!/bin/bash
# node_exec.sh NODE COMMAND...  - run a command inside a node; NODE is ctl, nodeK or K.
# nsenter hands no signals on: whoever must end the command signals its process group.
. "$(dirname "$0")/namespaces.sh"
node=$(name "$1")
shift
pid=$(init_of "$node") || die "$node does not run"
exec nsenter -t "$pid" -m -u -i -n -p --wd="$PWD" env SLURM_CONF=/etc/slurm/slurm.conf "$@"
