"""`outlast convert`, `verify` and `inspect`: what can be done to a checkpoint without a job.

Exit code: 0 all is right, 1 something is not, 2 misuse, 130 interrupted. What is slow to import,
numpy with the formats, waits until a command runs.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlast.cluster.errors import Corrupt, Misuse

if TYPE_CHECKING:
    from outlast.checkpoint.contents import Contents
    from outlast.checkpoint.convert import Conversion, Progress
    from outlast.checkpoint.formats.registry import Opened

FORMATS = ("native", "deepspeed", "universal", "dcp", "safetensors", "megatron")
EXIT_WRONG, EXIT_INTERRUPTED = 1, 130
_LINE_S = 10.0  # between lines of progress where there is no terminal
_TEXT_MAX = 300  # of a fact in a table
_RANKS_MAX = 1 << 16  # that a checkpoint is believed to be of
_COLUMNS = 120  # of a table where there is no terminal


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for add in (
        click.option("--from", "source_format", type=click.Choice(FORMATS),
                     help="Format of the source [default: what it looks like]."),
        click.option("--workers", type=click.IntRange(1), default=min(4, os.cpu_count() or 1),
                     help="Threads; each holds some tens of MB.", show_default=True),
        click.option("--follow-links", is_flag=True,
                     help="Follow symbolic links out of the directory, as in a download cache."),
    ):  # fmt: skip
        command = add(command)
    return command


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--to", required=True, type=click.Choice(FORMATS), help="Format to write.")
@click.option("--ranks", type=click.IntRange(1), help="Data-parallel ranks that will load it "
              "[default: those of the source, or 1].")  # fmt: skip
@click.option("--stage", type=click.IntRange(1, 3),
              help="ZeRO stage for DeepSpeed [default: that of the source, or 1].")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Of weights in safetensors [default: the model's].")  # fmt: skip
@click.option("--check", is_flag=True, help="Show what would become of everything, write nothing.")
@click.option("--proof/--no-proof", default=True, help="Read the result again and compare it.")
@_options
def convert(source: str, destination: str, **options: Any) -> None:
    """Write the checkpoint SOURCE in another format into DESTINATION, and prove it.

    What was written is read again and compared with the source, element by element, before it
    gets its name. An interrupted conversion goes on where it was.
    """
    from outlast.checkpoint.convert import Conversion
    from outlast.checkpoint.convert import convert as run
    from outlast.checkpoint.formats.registry import FORMATS as known
    from outlast.checkpoint.items import Wanted
    from outlast.checkpoint.proof import left_behind

    to = known[options["to"]]
    for choice in ("ranks", "stage", "dtype"):
        if options[choice] and choice not in to.choices:
            raise Misuse(f"--{choice} makes no difference to {to.name}: leave it out")
    if "://" in destination:
        raise Misuse(f"{destination} is a URL: convert into a directory, and copy that")
    with _opened(source, options) as opened:
        contents = opened.source.contents
        ranks, stage = options["ranks"] or _was(contents, "ranks"), options["stage"]
        wanted = Wanted(ranks=ranks, stage=stage or min(3, _was(contents, "stage")),
                        dtype=options["dtype"])  # fmt: skip
        job = Conversion(source=opened, to=to, destination=Path(destination), wanted=wanted,
                         workers=options["workers"], proof=options["proof"])  # fmt: skip
        if options["check"]:
            sys.exit(_check(job))
        try:
            with _progress() as progress:
                place = run(job, progress)
        except KeyboardInterrupt:
            _say(f"outlast: interrupted; what is done is kept in {job.part}: "
                 "the same command goes on", error=True)  # fmt: skip
            sys.exit(EXIT_INTERRUPTED)
        for text in (*left_behind(contents, to, wanted), *contents.left_out):
            _say(f"not carried: {text}", error=True)
        _say(f"{place}: every element is the source's" if job.proof else f"{place}: not proven")


@click.command()
@click.argument("checkpoint")
@_options
def verify(checkpoint: str, **options: Any) -> None:
    """Read all of CHECKPOINT and say what is wrong with it, one line each.

    That every element is there once; checksums, where the format has them; numbers that are none;
    weights that are not those of the optimizer's masters.
    """
    from outlast.checkpoint.convert import counted
    from outlast.checkpoint.dtypes import nbytes
    from outlast.checkpoint.proof import problems

    with _opened(checkpoint, options) as opened:
        contents = opened.source.contents
        with _progress() as progress:
            tick = counted(progress, "reading", nbytes(contents.arrays))
            found = list(problems(opened, options["workers"], tick))
    for text in found:
        _say(text)
    if found:
        sys.exit(EXIT_WRONG)
    _say(f"{opened.path}: step {contents.step}, {len(contents.arrays)} arrays, all right")


@click.command()
@click.argument("checkpoint")
@click.option("--tensors", is_flag=True, help="List every array with its digest.")
@_options
def inspect(checkpoint: str, **options: Any) -> None:
    """Show what CHECKPOINT holds."""
    with _opened(checkpoint, options) as opened:
        if options["tensors"]:
            _list(opened, options["workers"])
        else:
            _show(opened)


def _was(contents: "Contents", what: str) -> int:
    """How many ranks the source was written by, or its stage; 1 where it does not say."""
    source = contents.facts.get("source")
    value = source.get(what) if isinstance(source, dict) else None
    return value if isinstance(value, int) and 0 < value <= _RANKS_MAX else 1


@contextmanager
def _opened(path: str, options: dict[str, Any]) -> Iterator["Opened"]:
    """The checkpoint; damage that is met meanwhile is one line and exit code 1."""
    from outlast.checkpoint.formats.registry import open_checkpoint

    try:
        opened = open_checkpoint(path, options["source_format"], options["follow_links"])
        try:
            yield opened
        finally:
            opened.source.close()
    except Corrupt as error:
        _say(f"outlast: {error}", error=True)
        sys.exit(EXIT_WRONG)
    except (Misuse, OSError) as error:
        raise Misuse(_plain(str(error))) from error


def _plain(text: str) -> str:
    """Names in a checkpoint are not ours, and may be orders to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _say(text: str, error: bool = False) -> None:
    click.echo(_plain(text), err=error)


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar on a terminal, and otherwise a line now and then; on stderr."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def line(what: str, at: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said >= _LINE_S:
                said = time.monotonic()
                _say(f"{what}: {at / 1e6:,.0f} of {total / 1e6:,.0f} MB", error=True)

        yield line
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn(),
               rich.TransferSpeedColumn(), rich.TimeRemainingColumn())  # fmt: skip
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, rich.TaskID] = {}

        def bar(what: str, at: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=at)

        yield bar


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(f"{c:,}" if isinstance(c, int) else _plain(str(c)) for c in row))
    width = None if sys.stdout.isatty() else _COLUMNS
    Console(width=width, highlight=False, markup=False).print(table)


def _show(opened: "Opened") -> None:
    from outlast.checkpoint.dtypes import nbytes

    contents = opened.source.contents
    count = sum(array.numel for array in contents.of("param"))
    _say(f"{opened.path}\n{opened.format.name}, step {contents.step}, {count:,} "
         f"parameters in {contents.dtype}, {nbytes(contents.arrays):,} bytes")  # fmt: skip
    roles = dict.fromkeys(array.role for array in contents.arrays)
    _table(("role", "tensors", "elements", "bytes", "dtype"), [
        (role, len(arrays), sum(a.numel for a in arrays), nbytes(arrays),
         ", ".join(sorted({a.dtype for a in arrays})))
        for role in roles if (arrays := contents.of(role))
    ])  # fmt: skip
    if contents.groups:
        _table(("group", "tensors", "hyper-parameters"), [
            (index, len(group.names), _short(group.hyper | group.scalars))
            for index, group in enumerate(contents.groups)
        ])  # fmt: skip
    told = [*contents.facts.items(), *contents.run.items()]
    told += [("tied", f"{alias} is {name}") for alias, name in contents.aliases.items()]
    told += [("left out", text) for text in contents.left_out]
    if told:
        _table(("fact", "value"), [
            (name, value if isinstance(value, str) else _short(value)) for name, value in told
        ])  # fmt: skip


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    text = text[1:-1] if isinstance(value, dict) else text
    return text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}…"


def _list(opened: "Opened", workers: int) -> None:
    """One line per array: digest, dtype, shape, key; those without a stored digest are read."""
    from outlast.checkpoint.convert import counted
    from outlast.checkpoint.dtypes import nbytes
    from outlast.checkpoint.proof import survey

    contents = opened.source.contents
    digests = {array.key: opened.source.stored_digest(array) for array in contents.arrays}
    if None in digests.values():
        with _progress() as progress:
            tick = counted(progress, "reading", nbytes(contents.arrays))
            for array, found in survey(opened, workers, tick):
                if isinstance(found, Corrupt):
                    raise found
                digests[array.key] = found.digest
    for array in contents.arrays:
        shape = ",".join(map(str, array.shape))
        _say(f"{digests[array.key]}  {array.dtype}  [{shape}]  {array.key}")


def _check(job: "Conversion") -> int:
    """What would become of everything; the exit code."""
    from outlast.checkpoint import proof
    from outlast.checkpoint.convert import check_place
    from outlast.checkpoint.dtypes import nbytes

    contents = job.source.source.contents
    kept = job.to.stored(contents, job.wanted)
    rows = []
    for role in dict.fromkeys(array.role for array in contents.arrays):
        for dtype in sorted({array.dtype for array in contents.of(role)}):
            arrays = [array for array in contents.of(role) if array.dtype == dtype]
            made = sorted({kept[a.key].dtype for a in arrays if a.key in kept})
            rows.append((role, len(arrays), sum(a.numel for a in arrays), dtype,
                         ", ".join(made) or "left behind"))  # fmt: skip
    _say(f"{job.source.path} ({job.source.format.name}, step {contents.step}) to "
         f"{job.place} ({job.to.name})")  # fmt: skip
    _table(("role", "tensors", "elements", "from", "to"), rows)
    for index, group in enumerate(contents.groups):
        _say(f"group {index}: {len(group.names)} tensors, {_short(group.hyper)}")
    for alias, name in contents.aliases.items():
        _say(f"tied: {alias} is {name}, stored once")
    for text in (behind := list(proof.left_behind(contents, job.to, job.wanted))):
        _say(f"as the format is: {text}")
    size, wrong = proof.planned(job.source, job.to, job.wanted)
    try:
        check_place(job, size)
    except Misuse as error:
        wrong.append(str(error))
    if (more := size - nbytes(kept.values())) > 0:
        _say(f"{size:,} bytes, {more:,} of them headers, padding, second copies")
    wrong += [f"left out: {text}" for text in contents.left_out]
    wrong += [*proof.incomplete(contents), *proof.disagreements(job.source)]
    for text in wrong:
        _say(f"WRONG: {text}")
    lost = "else would be lost" if behind else "would be lost"
    _say("Nothing was written." if wrong else f"Nothing {lost}. Nothing was written.")
    return EXIT_WRONG if wrong else 0
