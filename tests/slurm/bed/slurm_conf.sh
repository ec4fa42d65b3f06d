#!/bin/bash
# slurm_conf.sh COUNT  - write what SLURM and the name service of COUNT nodes read.
# Every value differs from SLURM's default because of something measured here; see the comments.
. "$(dirname "$0")/namespaces.sh"
count=$1 etc=$BED_DIR/etc
{
  echo "127.0.0.1 localhost"
  for node in ctl $(seq -f node%g "$count"); do echo "$(address "$node") $node"; done
} >"$etc/hosts"
: >"$etc/resolv.conf"
for node in ctl $(seq -f node%g "$count"); do echo "$node" >"$etc/hostname.$node"; done
gpus=
if [ "$BED_GPUS" -gt 0 ]; then
  gpus=" Gres=gpu:$BED_GPUS"
  # Character devices: with regular files SLURM leaves CUDA_VISIBLE_DEVICES empty.
  for gpu in $(seq 0 $((BED_GPUS - 1))); do mknod "$BED_DIR/dev/gpu$gpu" c 1 3; done
  echo "Name=gpu File=$BED_DIR/dev/gpu[0-$((BED_GPUS - 1))]" >"$etc/gres.conf"
fi
cat >"$etc/slurm.conf" <<CONF
ClusterName=bed
SlurmctldHost=ctl($(address ctl))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may not start before its old credential has expired: 5 s instead of 120.
AuthInfo=socket=$BED_DIR/munge/socket,cred_expire=5
# One user on one host: no control groups, no accounting.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
# What slurmd keeps is on the node's own disk, and so is TmpFS: the directories that the pmix
# plugins of several nodes make in one /tmp would collide.
StateSaveLocation=$BED_DIR/state
SlurmdSpoolDir=$BED_DIR/local/spool
TmpFS=$BED_DIR/local/tmp
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$BED_DIR/log/slurmctld.log
SlurmdLogFile=$BED_DIR/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
DebugFlags=NO_CONF_HASH
# A silent node is DOWN after 12 to 16 s. Sites wait 300 s and more: nothing may depend on it.
SlurmdTimeout=5
MessageTimeout=5
TCPTimeout=1
KillWait=5
UnkillableStepTimeout=10
CompleteWait=0
ReturnToService=2
# The death of a node must not kill what the job itself can survive.
KillOnBadExit=0
WaitTime=0
InactiveLimit=0
JobRequeue=1
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${gpus:+GresTypes=gpu}
NodeName=node[1-$count] CPUs=$BED_CPUS CoresPerSocket=$BED_CPUS RealMemory=4000$gpus
PartitionName=DEFAULT Nodes=node[1-$count] DefaultTime=60 MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
CONF
