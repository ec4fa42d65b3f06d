"""`outlast plan`: what islands exchange, and the bandwidth at which they hardly wait for it.

It asks the simulator of `layout.utilisation`, and compares that with the paper it follows. Bytes
are those in one direction over the link of one island, which is taken for the narrowest.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from outlast.cluster.errors import Misuse
from outlast.layout.utilisation import (
    Array,
    Exchange,
    Model,
    at_once,
    needed,
    streamed,
    utilisation,
)

if TYPE_CHECKING:
    from outlast.runtime.islands.settings import Islands

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
BFLOAT16_BITS = 16
# For each element, with the scale of its block; `runtime.islands.codec` has the same in bytes.
CODEC_BITS = {"e3m0": 129 / 32, "int8": 258 / 32, "none": 32.0, "topk": 116 / 512}
PARAMETERS_MAX = 1e18
_POWERS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}

# Table 4 of the paper: Gbit/s that LEVELS need, H = 100, fragments of 3 layers, tau = 1, 2 islands.
TABLE_4_EVERY, TABLE_4_FRAGMENT = 100, 3
TABLE_4_METHODS = ("data parallel", "DiLoCo", "streaming", "overlapped", "overlapped, FP4")
TABLE_4_GRID = np.logspace(-1, 3, 50)  # all its numbers are of this grid, but for their rounding
TABLE_4: dict[str, tuple[Model, tuple[tuple[float, ...], ...]]] = {
    "1B": (Model(1e9, 24, 0.1), (
        (86.8, 152.6, 184.2, 222.3, 569.0), (1.4, 6.2, 13.3, 23.3, 86.8),
        (1.4, 5.2, 9.1, 16.0, 28.1), (1.4, 4.3, 6.2, 9.1, 11.0), (0.4, 0.9, 1.7, 2.0, 3.0),
    )),
    "10B": (Model(1e10, 48, 0.8), (
        (104.8, 222.3, 222.3, 268.3, 471.5), (1.7, 7.5, 16.0, 33.9, 104.8),
        (1.7, 5.2, 9.1, 13.3, 19.3), (1.7, 3.6, 5.2, 6.2, 7.5), (0.4, 0.9, 1.4, 1.4, 1.7),
    )),
    "100B": (Model(1e11, 108, 4.9), (
        (184.2, 323.8, 390.7, 390.7, 471.5), (3.0, 11.0, 23.3, 49.4, 184.2),
        (2.4, 6.2, 9.1, 11.0, 19.3), (1.7, 3.6, 4.3, 5.2, 5.2), (0.5, 0.9, 1.1, 1.1, 1.4),
    )),
}  # fmt: skip


def plan_islands(options: Mapping[str, Any], console: Console) -> None:
    """The command behind `options`, as `launch.cli` names them.

    Raises:
        Misuse: they do not fit together, or a file cannot be written.
    """
    from outlast.runtime.islands.settings import Islands

    _check(options)
    if options["table4"]:
        cells = list(table_4())
        _write(options["as_json"], cells)
        _show_table_4(cells, console)
        return
    model = Model(count(options["params"]), options["layers"], options["step_time"])
    names = ("every", "fragment", "delay", "codec")
    settings = Islands(**{name: options[name] for name in names})
    found = methods(model.layers, options["islands"], settings)
    latency_s = options["latency"] / 1e3
    bandwidths = np.array(options["bandwidth"], dtype=np.float64)
    reports = {
        name: report(model, exchange, bandwidths, latency_s) for name, exchange in found.items()
    }
    fewer = reports["data parallel, bf16"]["bytes_per_step"]
    for told in reports.values():
        told["times_fewer"] = fewer / told["bytes_per_step"]
    if options["plot"]:
        _plot(model, found, latency_s, options["plot"])
    _write(options["as_json"], {"model": asdict(model), "methods": reports})
    _show(model, reports, console)


def _check(options: Mapping[str, Any]) -> None:
    """Refuse, before anything is computed, what click lets pass."""
    for name in ("step_time", "latency", "bandwidth"):
        values = options[name] if name == "bandwidth" else [options[name]]
        if not all(map(isfinite, values)):
            raise Misuse(f"--{name.replace('_', '-')} {options[name]}: use finite numbers")
    if options["plot"] and options["table4"]:
        raise Misuse("--table4 has no picture: leave out --plot")
    if options["plot"] and Path(options["plot"]).suffix.lower() != ".png":
        raise Misuse(f"--plot {options['plot']!r}: name a file that ends in .png")


def count(text: str) -> float:
    """Parameters of a size such as 350M, 1.3B, 1.3e9 or 1300000000; raises Misuse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:E\+?\d{1,2})?)([KMBT]?)", text.strip().upper())
    if found is None or not 1 <= (size := float(found[1]) * _POWERS[found[2]]) <= PARAMETERS_MAX:
        raise Misuse(f"--params {text!r} is not a number of parameters: write 350M or 1.3B")
    return size


def methods(layers: int, islands: int, settings: "Islands") -> dict[str, Exchange]:
    """What is compared, by name: the paper's methods, then what this runtime does.

    A ring reduces in 2 (M - 1) hops and takes 2 (M - 1) / M of the bytes over every link; codes
    cannot be added on the way, so they go from each island to M - 1 others. There the closing of
    the round follows, one way more.
    """
    reduced, hops = BFLOAT16_BITS * 2 * (islands - 1) / islands, 2 * (islands - 1)
    coded = CODEC_BITS[settings.codec] * (islands - 1)
    delay, every = settings.delays(0, 1, 1)[0], settings.every
    parts = streamed(layers, settings.fragment, every, settings.order)
    overlapped = f"overlapped by {delay}"
    return {
        "data parallel, bf16": Exchange(reduced, at_once(layers, 1), trips=hops),
        "DiLoCo, bf16": Exchange(reduced, at_once(layers, every), trips=hops),
        "streaming, bf16": Exchange(reduced, parts, trips=hops),
        f"{overlapped}, bf16": Exchange(reduced, parts, delay, trips=hops),
        f"{overlapped}, {settings.codec}": Exchange(coded, parts, delay),
        f"outlast, {settings.codec}": Exchange(coded, parts, delay, whole=True, trips=2),
    }


def report(model: Model, exchange: Exchange, bandwidths: Array, latency_s: float) -> dict[str, Any]:
    """JSON of one method; bandwidths, float64 [n], in Gbit/s, null where none is enough."""
    enough = needed(model, exchange, LEVELS, latency_s)
    reached = utilisation(model, exchange, bandwidths, latency_s)
    return {
        "bytes_per_step": exchange.mean_bytes(model),
        "peak_bytes": exchange.peak_bytes(model),
        "needed_gbits": {
            f"{level:g}": gbits if isfinite(gbits) else None
            for level, gbits in zip(LEVELS, enough, strict=True)
        },
        "utilisation": {
            f"{gbits:g}": float(share) for gbits, share in zip(bandwidths, reached, strict=True)
        },
    }


def table_4() -> Iterator[dict[str, Any]]:
    """Every cell of the paper's table 4 beside what is simulated.

    The paper's fragments follow each other at a whole number of steps, H / P rounded, so that a
    fragment's turn comes every 96 or 108 steps. Its numbers are the last of the grid at which the
    level is not reached yet, rounded to two digits and then to one.
    """
    for size, (model, paper) in TABLE_4.items():
        parts = -(-model.layers // TABLE_4_FRAGMENT)
        turn = round(TABLE_4_EVERY / parts) * parts
        stream = streamed(model.layers, TABLE_4_FRAGMENT, turn)
        exchanges = (
            Exchange(BFLOAT16_BITS, at_once(model.layers, 1)),
            Exchange(BFLOAT16_BITS, at_once(model.layers, TABLE_4_EVERY)),
            Exchange(BFLOAT16_BITS, stream),
            Exchange(BFLOAT16_BITS, stream, delay=1),
            Exchange(4, stream, delay=1),
        )
        for method, exchange, numbers in zip(TABLE_4_METHODS, exchanges, paper, strict=True):
            reached = utilisation(model, exchange, TABLE_4_GRID)
            for level, number in zip(LEVELS, numbers, strict=True):
                last = int((reached >= level).argmax()) - 1
                yield {
                    "size": size, "method": method, "level": level, "paper": number,
                    "simulated": float(f"{round(float(TABLE_4_GRID[last]), 2):.1f}"),
                }  # fmt: skip


def _show(model: Model, reports: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    console.print(
        f"{model.parameters:.3g} parameters in {model.layers} layers, {model.step_s:.3g} s a step."
        "\n"
        "Over the link of an island, one way:"
    )
    table = _table("", "a step", "at most", "less than data parallel")
    for name, told in reports.items():
        sizes = (_size(told["bytes_per_step"]), _size(told["peak_bytes"]))
        table.add_row(name, *sizes, f"{told['times_fewer']:,.4g} times")
    console.print(table)
    console.print("Gbit/s for an island to compute so much of the time:")
    table = _table("", *(f"{level:.0%}" for level in LEVELS))
    for name, told in reports.items():
        enough = told["needed_gbits"].values()
        table.add_row(name, *("never" if gbits is None else f"{gbits:.3g}" for gbits in enough))
    console.print(table)
    console.print("Share of the time in which it computes, by Gbit/s:")
    table = _table("", *next(iter(reports.values()))["utilisation"])
    for name, told in reports.items():
        table.add_row(name, *(f"{share:.1%}" for share in told["utilisation"].values()))
    console.print(table)


def _show_table_4(cells: list[dict[str, Any]], console: Console) -> None:
    console.print("Gbit/s for a utilisation, as simulated (and in the paper, where that differs):")
    table = _table("", *(f"{level:.0%}" for level in LEVELS))
    for start in range(0, len(cells), len(LEVELS)):
        row = cells[start : start + len(LEVELS)]
        texts = [
            f"{cell['simulated']}"
            + (f" ({cell['paper']})" if cell["simulated"] != cell["paper"] else "")
            for cell in row
        ]
        table.add_row(f"{row[0]['size']} {row[0]['method']}", *texts)
    console.print(table)
    same = sum(cell["simulated"] == cell["paper"] for cell in cells)
    console.print(f"{same} of {len(cells)} are the paper's; a step of its grid is 21 %.")


def _plot(model: Model, found: Mapping[str, Exchange], latency_s: float, file: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise Misuse(f"--plot needs {error.name}: pip install outlast[report]") from error
    gbits = np.geomspace(1e-3, 1e3, 400)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, exchange in found.items():
        axes.plot(gbits, 100 * utilisation(model, exchange, gbits, latency_s), label=name)
    axes.set(xscale="log", xlabel="Gbit/s between islands", ylabel="% of the time computing")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # nowhere to write, or no such kind of picture
        raise Misuse(f"--plot: {error}") from error


def _write(file: str | None, content: Any) -> None:
    if file:
        try:
            Path(file).write_text(json.dumps(content, indent=1), "utf-8")
        except OSError as error:
            raise Misuse(f"--json: {error}") from error


def _size(size: float) -> str:
    unit, power = next((u, p) for u, p in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
                       if size >= p or p == 1.0)  # fmt: skip
    return f"{size / power:.3g} {unit}"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
