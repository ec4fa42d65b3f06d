"""The command line: `outlast launch` takes torchrun's flags, spelt either way, or PET_* variables.

Invariant: whatever is wrong with a command is one line on stderr that says what to do, and exit
code 2. Imports of anything slow wait until a job is really started.
"""

import secrets
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import outlast
from outlast.cluster.environment import KEY_BYTES_MIN, environment
from outlast.cluster.errors import Misuse
from outlast.launch.checkpoint_commands import convert, inspect, verify
from outlast.launch.config import LaunchConfig, key_values, node_range
from outlast.launch.processor import worker_count
from outlast.launch.surroundings import Surroundings, restart_of, shared_key, surroundings
from outlast.launch.topology import read_racks

EXIT_MISUSE = 2
NOTED = "Accepted for torchrun's sake; outlast has no such choice."

# name, type (None: a flag), default, help, and a short form; in the order of the help: who takes
# part, what becomes of losses, the script, what is written, and last what torchrun also has
OPTIONS: tuple[tuple[str, Any, Any, str, str], ...] = (
    ("nnodes", str, "", "Number of nodes: N, or MIN:MAX [default: 1, or the allocation's].", ""),
    ("spares", int, 0, "Nodes beyond those that wait, ready, for a lost one's place.", ""),
    ("nproc-per-node", str, "", "Workers per node: a number, auto, cpu or gpu [default: 1, or one "
     "for each GPU that SLURM gives].", ""),
    ("standalone", None, False, "All nodes on this machine; no endpoint or key needed.", ""),
    ("islands", int, 1, "Islands of one training: jobs that only exchange what they have learned "
     "[all on this machine, without --island].", ""),
    ("island", int, None, "Which of them this is, from 0.", ""),
    ("island-endpoints", str, "", "Where agents of each island listen, in order: "
     "HOST[:PORT][/HOST[:PORT]…],HOST[:PORT],… [default port: 29401].", ""),
    ("rdzv-endpoint", str, "", "Where agents meet: HOST:PORT[,HOST:PORT…].", ""),
    ("rdzv-id", str, "none", "Name of the job.", ""),
    ("job-key-file", str, "", "File with the job's secret key, instead of OUTLAST_JOB_KEY.", ""),
    ("node-name", str, "", "Name of this node [default: its host name].", ""),
    ("local-addr", str, "", "Address of this node that others can reach.", ""),
    ("interface", str, "", "Interface to the other nodes: name, network or address "
     "[default: the way to the endpoints].", ""),
    ("topology", str, "", "TOML file of what fails as a whole: [racks], rack = [\"node\", …] "
     "[default: as SLURM says].", ""),
    ("heartbeat", float, 0.5, "Seconds between signs of life; all waits are multiples.", ""),
    ("max-restarts", int, 0, "Failures of the script to forgive; kills always are.", ""),
    ("rebalance", None, False, "Fewer leaves for slow workers, with the same results.", ""),
    ("poison", click.Choice(["evict", "report"]), "evict",
     "What becomes of a worker that computes wrong gradients.", ""),
    ("shutdown-timeout", float, None, "Seconds from SIGTERM to SIGKILL [50 heartbeats].", ""),
    ("module", None, False, "SCRIPT is a Python module.", "m"),
    ("no-python", None, False, "Run SCRIPT itself, not with Python.", ""),
    ("tries", int, 3, "Under SLURM, starts in a row that come to no new step.", ""),
    ("no-requeue", None, False, "Under SLURM, not to start the job again.", ""),
    ("drain", None, False, "Under SLURM, to drain bad nodes; needs an operator's rights.", ""),
    ("role", str, "default", "ROLE_NAME of the workers.", ""),
    ("log-dir", str, "", "Directory of logs [default: outlast_logs/JOB].", ""),
    ("checkpoint-dir", str, "", "Directory or URL where a job leaves its state, and a started one "
     "looks for it [default: checkpoints in the log directory].", ""),
    ("checkpoint-every", str, "", "How often besides at a stop: 200 (steps), 30s, 10m, 2h.", ""),
    ("checkpoint-keep", int, 2, "Steps that stay there.", ""),
    ("redirects", str, "0", "To files: 0..3 (1 stdout, 2 stderr) or RANK:0..3,…", "r"),
    ("tee", str, "0", "To files and the console, in the same form.", "t"),
    ("local-ranks-filter", str, "", "Only these local ranks on the console: 0,1,…", ""),
    ("master-addr", str, "", "Same as --rdzv-endpoint MASTER_ADDR:MASTER_PORT.", ""),
    ("master-port", int, 0, "See --master-addr.", ""),
    ("node-rank", int, 0, NOTED + " Ranks follow the view.", ""),
    ("rdzv-backend", str, "outlast", NOTED, ""),
    ("rdzv-conf", str, "", NOTED + " All waits follow --heartbeat.", ""),
    ("monitor-interval", float, 0.1, NOTED + " Workers are watched without polling.", ""),
    ("start-method", click.Choice(["spawn", "fork", "forkserver"]), "spawn", NOTED, ""),
    ("run-path", None, False, NOTED + " The script runs as usual.", ""),
)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for name, kind, default, text, short in reversed(OPTIONS):
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
        shorts = [f"-{short}"] if short else []
        variable = name.replace("-", "_")
        command = click.option(
            *shorts, *spellings, variable, type=kind, default=default, is_flag=kind is None,
            envvar=f"PET_{variable.upper()}", help=text,
        )(command)  # fmt: skip
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(outlast.__version__, prog_name="outlast")
def commands() -> None:
    """Training that outlasts its machines."""


for _command in (convert, verify, inspect):
    commands.add_command(_command)


@commands.command(context_settings={"allow_interspersed_args": False})
@_with_options
@click.argument("script")
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED)
def launch(**options: Any) -> None:
    """Run SCRIPT on this node, as torchrun does; what follows SCRIPT is its own."""
    found = None
    if not (options["standalone"] or options["rdzv_endpoint"] or options["master_addr"]):
        found = surroundings(options["interface"])
    config = config_from_options(options, found)
    key = job_key(options["job_key_file"], config, found)
    try:
        Path(config.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misuse(f"--log-dir: {error}") from error
    if found is not None and found.supervises:
        from outlast.launch.slurm.supervisor import Supervisor

        sys.exit(Supervisor(config, found, options).run())
    if config.islands > 1 and config.island is None:
        from outlast.launch.islands import run_islands

        sys.exit(run_islands(config, key))
    if config.standalone:
        from outlast.launch.standalone import run_standalone

        sys.exit(run_standalone(config, key))
    from outlast.launch.node import run_node

    assert key is not None, "job_key refuses"
    code = run_node(config, key)
    if found is not None and found.slurm:
        from outlast.launch.slurm.conclusion import CUT_OFF
        from outlast.launch.slurm.job import outlive_supervisor

        outlive_supervisor(Path(config.log_dir), config.job, config.node, code == CUT_OFF)
    sys.exit(code)


@commands.command(context_settings={"allow_interspersed_args": False})
@_with_options
@click.option("--nodes", default=0, help="Nodes that train; --spares come on top.")
@click.option("--time", default="", help="Time limit as sbatch takes it, such as 2:00:00.")
@click.option("--partition", default="", help="As of sbatch.")
@click.option("--account", default="", help="As of sbatch.")
@click.option("--qos", default="", help="As of sbatch.")
@click.option("--gpus-per-node", default="", help="As of sbatch.")
@click.option("--job-name", default="", help="As of sbatch [default: the script's].")
@click.option("--sbatch", default="", metavar="FLAGS", help="Further flags of sbatch, in quotes.")
@click.option("--grace", default=60, show_default=True,
              help="Seconds before the time limit or preemption in which state goes to storage.")
@click.option("--join", default="", metavar="JOBID", help="Add nodes to this running job instead.")
@click.option("--print", "print_only", is_flag=True, help="Show the batch script, submit nothing.")
@click.argument("script", required=False)
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def submit(context: click.Context, **options: Any) -> None:
    """Have SLURM run SCRIPT: as with `outlast launch`, whose flags this takes, too."""
    from outlast.launch.slurm.submit import submit

    sys.exit(submit(options, _given(context)))


def _given(context: click.Context) -> list[str]:
    """The flags of `outlast launch` that stand on the command line."""
    words = []
    for name, kind, *_ in OPTIONS:
        variable = name.replace("-", "_")
        if context.get_parameter_source(variable) is click.core.ParameterSource.COMMANDLINE:
            words += [f"--{name}"] if kind is None else [f"--{name}", str(context.params[variable])]
    return words


@commands.command(context_settings={"allow_interspersed_args": False})
@click.option("--nodes", default=4, help="Pretended nodes of this machine, at least 3.")
@click.option("--nproc-per-node", default=1, help="Workers of each.")
@click.option("--spares", default=0, help="Warm nodes beyond those.")
@click.option("--fault", "faults", multiple=True, metavar="SPEC",
              help="kind[@step=N,phase=P,node=NAME,...][+...]; may be given often.")
@click.option("--faults", "file", metavar="FILE", help='TOML: faults = ["SPEC", ...].')
@click.option("--rounds", default=0, help="Random faults, each at full strength.")
@click.option("--mtbf", default=0.0, help="Random faults, in the mean so many seconds apart.")
@click.option("--duration", default=0.0, help="Seconds of --mtbf.")
@click.option("--kinds", default="", help="What random faults may be, such as kill-worker,hang.")
@click.option("--seed", default=0, help="Of random faults.")
@click.option("--namespaces", is_flag=True, help="Each node in its own network namespace.")
@click.option("--twin/--no-twin", default=True, help="Compare with an undisturbed run.")
@click.option("--pace", default=0.0, help="Seconds a step takes at least while faults are due.")
@click.option("--launch-flags", default="", help="Further flags of `outlast launch`, in quotes.")
@click.option("--json", "as_json", metavar="FILE", help="Write the verdict here, too.")
@click.option("--log-dir", default="outlast_logs/drill", show_default=True)
@click.argument("script")
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED)
def drill(**options: Any) -> None:
    """Run SCRIPT on pretended nodes, strike at them, and tell whether it kept every promise.

    Exit code: 0 passed, 1 a promise was broken, 2 misuse, 3 something could not be run here.
    """
    from rich.console import Console

    from outlast.launch.drill.drill import config_of, run_drill

    as_json = Path(options["as_json"]) if options["as_json"] else None
    sys.exit(run_drill(config_of(options), Console(), as_json))


@commands.command("plan-stripes")
@click.option("--nodes", default=0, help="Nodes of the job [default: those of --topology].")
@click.option("--nproc-per-node", default=1, help="Workers of each.")
@click.option("--parity", default=1, help="Parity units of a stripe: nodes that may be lost.")
@click.option("--group", default=16, help="Most members of a group.")
@click.option("--topology", default="", metavar="FILE", help='[racks], rack = ["node", ...].')
@click.option("--bytes-per-node", default="32GB", help="State of a node.", show_default=True)
@click.option("-p", "probability", type=click.FloatRange(0, 1), multiple=True, default=(1e-4,),
              help="Probability that a node is lost in one window; may be given often.")
@click.option("--json", "as_json", metavar="FILE", help="Write the plan here, too.")
def plan_stripes(**options: Any) -> None:
    """Show where parity would lie, what it costs, and which losses it survives."""
    from rich.console import Console

    from outlast.launch.plan_stripes import plan_stripes

    plan_stripes(options, Console())


@commands.command()
@click.option("--params", default="1B", help="Parameters of the model.", show_default=True)
@click.option("--layers", type=click.IntRange(1), default=24, show_default=True,
              help="Its layers, taken for equally large.")
@click.option("--step-time", type=click.FloatRange(1e-6, 1e6), default=0.1,
              show_default=True, help="Seconds in which an island computes a step.")
@click.option("--islands", type=click.IntRange(2), default=2, help="How many.", show_default=True)
@click.option("--every", default=30, help="H, steps from turn to turn.", show_default=True)
@click.option("--fragment", default=3, help="Layers of a fragment.", show_default=True)
@click.option("--delay", default=1, help="tau, steps an exchange may take.", show_default=True)
@click.option("--codec", default="e3m0", help="e3m0, int8, none or topk.", show_default=True)
@click.option("--bandwidth", type=click.FloatRange(1e-6, 1e6), multiple=True,
              default=(0.1, 1.0, 10.0), show_default=True,
              help="Gbit/s of an island's link; may be given often.")
@click.option("--latency", type=click.FloatRange(0, 1e6), default=0.0,
              help="Its milliseconds, one way.")
@click.option("--table4", is_flag=True, help="Simulate table 4 of Streaming DiLoCo instead.")
@click.option("--plot", default="", metavar="FILE", help="Draw the utilisation, as FILE.png.")
@click.option("--json", "as_json", metavar="FILE", help="Write the numbers here, too.")
def plan(**options: Any) -> None:
    """Show what islands would exchange, and which bandwidth that takes."""
    from rich.console import Console

    from outlast.launch.plan_islands import plan_islands

    plan_islands(options, Console())


@commands.command()
@click.option("--nproc-per-node", default="1", help="Workers of a node.", show_default=True)
@click.option("--bytes-per-worker", default="0", help="Memory that one will need, such as 32GB.")
@click.option("--interface", default="", help="Interface to the other nodes: name, network or "
              "address [default: the way to them].")
@click.option("--log-dir", default="", help="Where the job will write [default: as launch].")
@click.option("--nodes", default="", help="NODE,NODE,… to compare [default: the allocation].")
@click.option("--node-name", default="", help="Name of this node [default: its host name].")
@click.option("--meet", default="", metavar="DIR",
              help="New directory that these nodes share; SLURM needs none.")
@click.option("--json", "as_json", default="", metavar="FILE", help="Write the findings, too.")
def doctor(**options: Any) -> None:
    """Check this node, or all nodes of the allocation, and name the bad ones.

    Exit code: 0 healthy, 1 sick, 2 misuse.
    """
    from rich.console import Console

    from outlast.launch.doctor.doctor import leave, run_doctor

    leave(run_doctor(options, Console()))


def config_from_options(
    options: dict[str, Any], found: Surroundings | None = None
) -> LaunchConfig:
    """The config behind the flags, and behind what was found where none is given; raises Misuse."""
    low, high = node_range(options["nnodes"] or "1")
    if found is not None and not options["nnodes"]:
        low, high = found.node_range(options["spares"])
    key_values(options["rdzv_conf"])
    endpoint = options["rdzv_endpoint"]
    if not endpoint and options["master_addr"]:
        endpoint = f"{options['master_addr']}:{options['master_port'] or 29400}"
    local = options["standalone"] or (high == 1 and not endpoint and found is None)
    job = options["rdzv_id"]
    if job == "none" and (local or found is not None):
        job = f"job-{secrets.token_hex(4)}" if found is None else found.job
    log_dir = options["log_dir"] or (f"outlast_logs/{job}" if found is None else found.log_dir)
    endpoints = tuple(text.strip() for text in endpoint.split(",") if text)
    workers = found.nproc if found is not None and found.nproc else 1
    ranks = [text for text in options["local_ranks_filter"].split(",") if text.strip()]
    if not all(text.strip().isdecimal() for text in ranks):
        raise Misuse("--local-ranks-filter: give local ranks such as 0,1")
    _check_script(options)
    config = LaunchConfig(
        script=options["script"], script_args=tuple(options["script_args"]),
        min_nodes=low, max_nodes=high,
        nproc_per_node=worker_count(options["nproc_per_node"] or str(workers)),
        endpoints=() if local else endpoints if found is None else found.endpoints,
        job=job, standalone=local, log_dir=log_dir, max_restarts=options["max_restarts"],
        role=options["role"], module=options["module"], no_python=options["no_python"],
        checkpoint_dir=_absolute(options["checkpoint_dir"] or f"{log_dir}/checkpoints"),
        checkpoint_every=options["checkpoint_every"], checkpoint_keep=options["checkpoint_keep"],
        redirects=options["redirects"], tee=options["tee"],
        local_ranks_filter=tuple(int(text) for text in ranks),
        local_addr=options["local_addr"], interface=options["interface"],
        node=options["node_name"] or (
            found.node if found is not None else "node" if local else socket.gethostname()
        ),
        heartbeat_s=options["heartbeat"], spares=options["spares"],
        racks=read_racks(options["topology"]) if options["topology"] else {},
        rebalance=options["rebalance"], poison=options["poison"],
        shutdown_timeout_s=options["shutdown_timeout"],
        requeues=found.requeues if found is not None else restart_of(job),
        islands=options["islands"],
    )  # fmt: skip
    return _of_island(config, options)


def _of_island(config: LaunchConfig, options: dict[str, Any]) -> LaunchConfig:
    """The config of the island that the flags name, if they name one."""
    places = [text.strip() for text in options["island_endpoints"].split(",") if text]
    if options["island"] is None and not places:
        if config.islands > 1 and not config.standalone:
            raise Misuse("islands on several nodes: one `outlast launch` for each, with --island I "
                         "--island-endpoints HOST:PORT,HOST:PORT,…")  # fmt: skip
        return config
    together = {
        "--island I": options["island"] is not None,
        f"--islands {max(2, len(places))}": config.islands >= max(1, len(places)),
        "--island-endpoints with a place for each island": len(places) >= config.islands,
        "--rdzv-id NAME": options["rdzv_id"] != "none",
        "secret key, as OUTLAST_JOB_KEY or --job-key-file":
            bool(options["job_key_file"] or environment().job_key),
    }  # fmt: skip
    if missing := [name for name, given in together.items() if not given]:
        raise Misuse("flags of an island go together, the same for all but --island; there is no "
                     + "; no ".join(missing))  # fmt: skip
    return config.of_island(options["island"], places)


def job_key(path: str, config: LaunchConfig, found: Surroundings | None = None) -> bytes | None:
    """The key from the file, the environment or the surroundings; None where a standalone job
    makes its own."""
    try:
        key = Path(path).read_bytes().strip() if path else environment().job_key
    except OSError as error:
        raise Misuse(f"--job-key-file: {error}") from error
    try:
        if key is None and found is not None and config.island is None:
            key = found.key or shared_key(Path(config.log_dir) / "key")
    except OSError as error:
        raise Misuse(f"--log-dir: {error}") from error
    if key is None and not config.standalone:
        raise Misuse(
            "several nodes need a secret key, the same on each: export OUTLAST_JOB_KEY="
            "$(openssl rand -hex 32), or give --job-key-file"
        )
    if key is not None and len(key) < KEY_BYTES_MIN:
        raise Misuse(f"--job-key-file: shorter than {KEY_BYTES_MIN} bytes: openssl rand -hex 32")
    return key


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).absolute())


def _check_script(options: dict[str, Any]) -> None:
    script = options["script"]
    if options["no_python"] and shutil.which(script) is None:
        raise Misuse(f"{script!r} is not a program that can be run: check --no-python")
    if not options["no_python"] and not options["module"] and not Path(script).is_file():
        raise Misuse(f"script {script!r} does not exist")


def main() -> None:
    """Entry point of `outlast`."""
    try:
        commands.main(prog_name="outlast", standalone_mode=False)
    except click.ClickException as error:
        text = " ".join(error.format_message().split())
        click.echo(f"outlast: {text}", err=True)
        sys.exit(EXIT_MISUSE)
    except Misuse as error:
        click.echo(f"outlast: {error}", err=True)
        sys.exit(EXIT_MISUSE)
    except click.Abort:
        sys.exit(130)
