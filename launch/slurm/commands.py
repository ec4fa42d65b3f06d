"""What SLURM's own commands are asked and told; a cluster that does not answer gives no answer."""

import subprocess
import time
from collections.abc import Collection
from contextlib import suppress

import click

from outlast.launch.slurm.hostlist import hostnames

COMMAND_S = 30.0
AGAIN_S, AGAIN_MAX = 0.5, 60


def say(text: str) -> None:
    """A line for people, who may have no room for it: nothing depends on that."""
    with suppress(OSError):
        click.echo(f"outlast: {text}", err=True)


def command(*words: str) -> tuple[str, str]:
    """Run it: what it printed, and what went wrong, empty if nothing did."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    wrong = " ".join(done.stderr.split()) or f"{words[0]}: exit code {done.returncode}"
    return done.stdout.strip(), wrong if done.returncode else ""


def nodes_of(job: str) -> tuple[str, ...]:
    """The nodes that SLURM still counts to a running job; empty if it does not say."""
    text, _ = command("squeue", "-h", "-j", job, "-o", "%N")
    return hostnames(text) if text else ()


def preempted(job: str) -> bool:
    """Whether SLURM is taking the job's nodes away for another one."""
    shown = command("scontrol", "show", "job", job)[0]
    return any(word.startswith("PreemptTime=2") for word in shown.split())  # or None, Unknown


def drain(job: str, nodes: Collection[str]) -> None:
    """Take nodes out of service, where we may."""
    for node in nodes:
        reason = f"Reason=outlast: bad in job {job}"
        if command("scontrol", "update", f"NodeName={node}", "State=DRAIN", reason)[1]:
            say(f"{node} cannot be drained, which takes an operator's rights: excluded instead")


def requeue(job: str, bad: Collection[str], needed: int) -> str:
    """Start a job again without bad nodes; what is wrong if it cannot be, else empty.

    In this order, because exclusion is refused while the job runs, and a job on hold would stay
    there if we died in between.
    """
    partition, _, text = command("squeue", "-h", "-j", job, "-o", "%P|%x")[0].partition("|")
    before = hostnames(text) if text not in ("", "(null)") else ()  # --exclude, and earlier starts'
    listed = command("sinfo", "-h", "-N", "-p", partition, "-o", "%N")[0].split()
    if wrong := command("scontrol", "requeue", job)[1]:
        return wrong
    excluded = dict.fromkeys([*before, *bad])
    if listed and len({*listed} - {*excluded}) < needed:
        say(f"starts again, also on {', '.join(bad)}: without there are fewer than {needed} nodes")
    elif bad:
        say(f"starts again, without {', '.join(bad)}")
        order = ("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(excluded)}")
        for _ in range(AGAIN_MAX):
            if not command(*order)[1]:
                break
            time.sleep(AGAIN_S)
    else:
        say("starts again")
    return ""
