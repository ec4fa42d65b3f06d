#!/bin/bash
# Install what a bed needs and the machine lacks; says in one line why it cannot.
set -u
missing=()
for pair in slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge ip:iproute2 \
  mpirun.openmpi:openmpi-bin; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
# srun --mpi=pmix loads it by the name without a number, which only this package has.
compgen -G "/usr/lib/*/pmix2/lib/libpmix.so" >/dev/null || missing+=(libpmix-dev)
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || { echo "not installed: ${missing[*]} (and we are not root)" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "no apt-get to install ${missing[*]}" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# Two runs on one machine may want the lock of the package manager at the same time.
wait=(-o DPkg::Lock::Timeout=120 -qq)
if apt-get "${wait[@]}" update >"$log" 2>&1 &&
  apt-get "${wait[@]}" install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
  rm "$log"
else
  echo "apt-get install ${missing[*]}: $(tail -n 1 "$log")" >&2
  rm "$log"
  exit 1
fi
