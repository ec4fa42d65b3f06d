"""`outlast submit`: a batch script that people can read, and its submission.

Everything that makes a job survive is in the script and not in our heads: it is the same script
whether it is printed, kept, or changed by hand.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from outlast.cluster.errors import Misuse
from outlast.launch.slurm.job import SlurmJob

LOGS = "outlast_logs"
CLOCK_S = 30  # SLURM looks only so often at how much time a job has left
DIRECTIVES = (
    ("partition", "partition"), ("account", "account"), ("qos", "qos"), ("time", "time"),
    ("gpus_per_node", "gpus-per-node"),
)  # fmt: skip
SCRIPT = """\
#!/bin/bash
# {about}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
# All of every node: agents and workers share it.
#SBATCH --exclusive
#SBATCH --mem=0
{given}# A dead node must not end the job: those that are left go on.
#SBATCH --no-kill
# {again}
#SBATCH --{requeue}
#SBATCH --open-mode=append
#SBATCH --output={logs}/slurm-%j.out
# To every agent, before time is up or the nodes are taken away: {grace} s are for
# {ending}, as SLURM may be {clock} s late.
#SBATCH --signal={signal}@{seconds}

# Starts an agent on every node, which starts the workers. No srun is needed, nor MASTER_ADDR.
{command}
"""


def submit(options: dict[str, Any], flags: list[str]) -> int:
    """Write the script and hand it to sbatch, or print it; the exit code.

    Args:
        options: of `outlast submit`, by name.
        flags: those of `outlast launch` among them, as they were given.
    """
    text = joining_script(options) if options["join"] else batch_script(options, flags)
    if options["print_only"]:
        click.echo(text, nl=False)
        return 0
    if shutil.which("sbatch") is None:
        raise Misuse("sbatch is not here: run this where jobs are submitted, or give --print")
    Path(LOGS).mkdir(exist_ok=True)  # SLURM makes no directory for the output
    done = subprocess.run(["sbatch"], input=text, text=True)
    return done.returncode


def batch_script(options: dict[str, Any], flags: list[str]) -> str:
    """The script of a new job."""
    nodes, spares, script = options["nodes"], options["spares"], options["script"]
    if nodes < 1 or not script:
        raise Misuse("say how many nodes train and what: outlast submit --nodes 4 train.py")
    if "--shutdown-timeout" not in flags:
        flags = [*flags, "--shutdown-timeout", str(options["grace"])]
    return _filled(options, {
        "about": f"{nodes} nodes that train" + f", {spares} more as spares" * (spares > 0),
        "nodes": nodes + spares, "name": Path(script).stem, "logs": LOGS,
        "again": "The job may start again, after preemption or a loss that it cannot survive.",
        "requeue": "no-requeue" if options["no_requeue"] else "requeue",
        "ending": "bringing its state to storage", "signal": "USR1",
    }, ["exec", _program(), "launch", *flags, script, *options["script_args"]])  # fmt: skip


def joining_script(options: dict[str, Any]) -> str:
    """The script of nodes that join a running job."""
    directory = Path(options["log_dir"] or f"{LOGS}/slurm-{options['join']}")
    job = SlurmJob.read(directory)
    if job is None:
        raise Misuse(f"--join: no job of SLURM writes to {directory}: give that job's --log-dir")
    words = ["exec", "srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", _program(), "launch"]
    return _filled({**options, "sbatch": f"--chdir={shlex.quote(job.here)} {options['sbatch']}"}, {
        "about": f"joins job {job.number}, for the place of a lost node or as a spare",
        "nodes": options["nodes"] or 1, "name": "join", "logs": directory.absolute(),
        "again": "There is nothing to start again.", "requeue": "no-requeue",
        "ending": "leaving the job, which goes on", "signal": "TERM",
    }, [*words, *job.flags, *job.arguments])  # fmt: skip


def _filled(options: dict[str, Any], fields: dict[str, Any], words: list[str]) -> str:
    given = [f"--{name}={shlex.quote(options[variable])}" for variable, name in DIRECTIVES
             if options[variable]]  # fmt: skip
    given += map(shlex.quote, shlex.split(options["sbatch"]))
    return SCRIPT.format(**{
        **fields, "name": options["job_name"] or fields["name"],
        "given": "".join(f"#SBATCH {word}\n" for word in given),
        "grace": options["grace"], "clock": CLOCK_S, "seconds": options["grace"] + CLOCK_S,
        "command": shlex.join(words),
    })  # fmt: skip


def _program() -> str:
    found = Path(sys.argv[0])
    return str(found.absolute()) if found.name == "outlast" else "outlast"
