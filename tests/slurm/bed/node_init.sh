#!/bin/bash
# Process 1 of a node: makes what is private to it, then reaps orphans until it is killed.
# Called by `boot` (namespaces.sh) through unshare: node_init.sh BED_DIR NODE
bed=$1 node=$2
# /proc is still the host's here: it shows our number and start time as the host sees them.
read -r stat </proc/self/stat
pid=${stat%% *} stat=${stat##*) }
set -- $stat
start=${20}
mount -t proc proc /proc
mount -t tmpfs -o size=8g,mode=1777 tmpfs /dev/shm
mount -t tmpfs -o size=64m,mode=755 tmpfs "$bed/local"  # the node's own disk: lost when it dies
mount --bind "$bed/etc" /etc/slurm
mount --bind "$bed/etc/hosts" /etc/hosts
mount --bind "$bed/etc/resolv.conf" /etc/resolv.conf
mount --bind "$bed/etc/hostname.$node" /etc/hostname
mkdir -p "$bed/local/run" "$bed/local/spool"
mkdir -m 1777 "$bed/local/tmp"
mount --bind "$bed/local/run" /run
hostname "$node"
ulimit -c 0
echo "$pid $start" >"$bed/run/$node.pid.new" && mv "$bed/run/$node.pid.new" "$bed/run/$node.pid"
: >"$bed/run/$node.ready"
trap 'exit 0' TERM
while :; do sleep 1000000 & wait $!; done
