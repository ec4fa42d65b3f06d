"""The pictures of the report: matplotlib figures as SVG that follows the page's light or dark.

Every colour in a figure is a stand-in that is replaced by a variable of the page's style sheet;
so the figures hold no colour of their own, and nothing outside the page is needed to show them.
matplotlib is imported when the first figure is drawn.
"""

import io
import re
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from outlast.launch.report.timeline import PHASES, Outcome, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-in -> variable of the style sheet.
COLOURS = {
    name: f"#0101{index:02x}"
    for index, name in enumerate(
        ("ink", "muted", "grid", "pale", "fault", "join", "bar", *(f"phase-{p}" for p in PHASES)), 1
    )
}
WIDTH_INCHES = 9.6
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "outlast",  # the same record gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "grid.color": COLOURS["grid"],
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def draw(height: float, rows: Sequence[int], paint: Callable[["Sequence[Axes]"], None]) -> str:
    """An SVG element of `height` inches, with axes of the given heights above each other."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        grid = figure.subplots(
            len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows}
        )
        paint([row[0] for row in grid])
        return _svg(figure)


def _svg(figure: "Figure") -> str:
    """The figure as an element to be put into a page, its colours those of the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for _ in ("width", "height"):  # the page decides
        text = re.sub(r'(<svg[^>]*?) (?:height|width)="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Clip paths and markers are named alike in every figure; in one page they must differ.
    mark = f"f{zlib.crc32(text.encode()):x}-"
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}", text)
    for name, stand_in in COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    return text


def loss_curves(run: RunRecord, twin: RunRecord | None) -> str:
    """Loss per step, the twin's thick and pale below the run's, and the difference beneath."""

    def paint(axes: "Sequence[Axes]") -> None:
        curve = axes[0]
        if twin is not None:
            steps, losses = zip(*sorted(twin.losses.items()), strict=True)
            label = "undisturbed twin"
            curve.plot(steps, losses, color=COLOURS["pale"], linewidth=7, label=label)
            common = sorted(run.losses.keys() & twin.losses.keys())
            apart = [run.losses[step] - twin.losses[step] for step in common]
            axes[1].plot(common, apart, color=COLOURS["ink"], linewidth=1.2)
            axes[1].set_ylabel("difference")
            if not any(apart):
                axes[1].set_ylim(-1, 1)
                axes[1].set_yticks([0])
                middle = (common[0] + common[-1]) / 2
                text = f"exactly 0 in all {len(common)} steps"
                axes[1].text(middle, 0.35, text, ha="center", color=COLOURS["muted"])
        steps, losses = zip(*sorted(run.losses.items()), strict=True)
        curve.plot(steps, losses, color=COLOURS["ink"], linewidth=1.2, label="this run")
        curve.set_ylabel("loss")
        curve.legend(loc="upper right")
        axes[-1].set_xlabel("step")
        _fault_lines(axes, run)

    rows = [4, 1] if twin is not None and twin.losses else [4]
    return draw(4.4 if len(rows) == 2 else 3.4, rows, paint)


def _fault_lines(axes: "Sequence[Axes]", run: RunRecord) -> None:
    marked: list[int] = []
    for number, outcome in enumerate(run.outcomes, 1):
        if outcome.fault is None:
            continue
        step = run.step_at(outcome.time)
        beside = 3 + 11 * marked.count(step)  # points: labels of one step stand side by side
        marked.append(step)
        for ax in axes:
            ax.axvline(step, color=COLOURS["fault"], linewidth=0.9, linestyle=(0, (3, 3)))
        axes[0].annotate(
            f"{number} · {outcome.fault.label}",
            (step, 0.02), xycoords=("data", "axes fraction"), xytext=(beside, 0),
            textcoords="offset points", rotation=90, va="bottom", fontsize=8,
            color=COLOURS["fault"],
        )  # fmt: skip


def membership(run: RunRecord) -> str:
    """A row per node, a bar per life, thinner with fewer workers; faults, joins, generations."""
    start = run.spans[0].start
    nodes = sorted({span.node for span in run.spans}, reverse=True)
    most = max((span.workers for span in run.spans), default=1) or 1

    def paint(axes: "Sequence[Axes]") -> None:
        (ax,) = axes
        for change in run.changes[1:]:
            ax.axvline(change.agreed - start, color=COLOURS["grid"], linewidth=0.8, zorder=0)
            ax.annotate(
                str(change.generation), (change.agreed - start, 1),
                xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                ha="center", fontsize=8, color=COLOURS["muted"],
            )  # fmt: skip
        for span in run.spans:
            height = 0.55 * max(span.workers, 0.3) / most
            row, length = nodes.index(span.node), span.stop - span.start
            ax.barh(row, length, left=span.start - start, height=height, color=COLOURS["bar"])
        for number, outcome in enumerate(run.outcomes, 1):
            for node in _nodes(outcome):
                style = ("fault", "x") if outcome.fault is not None else ("join", "^")
                place = (outcome.time - start, nodes.index(node) if node in nodes else 0)
                ax.plot(*place, marker=style[1], color=COLOURS[style[0]], markersize=8, mew=2)
                ax.annotate(
                    str(number), place, xytext=(0, 9), textcoords="offset points", ha="center",
                    fontsize=8, fontweight="bold", color=COLOURS[style[0]],
                )  # fmt: skip
        ax.set_yticks(range(len(nodes)), nodes)
        ax.set_ylim(-0.6, len(nodes) - 0.2)
        ax.set_xlabel("seconds since the founding view; above: generations")

    return draw(0.9 + 0.55 * len(nodes), [1], paint)


def _nodes(outcome: Outcome) -> list[str]:
    if outcome.fault is not None:
        return [outcome.fault.node]
    change = outcome.change
    if change is None:
        return []
    return [m.node for m in change.joined_members] + [node for node, _ in change.joined_workers]


def recovery_phases(run: RunRecord) -> str:
    """A stacked bar per event: milliseconds of each phase, the sum at its end."""
    numbered = [(n, o) for n, o in enumerate(run.outcomes, 1) if o.change is not None]

    def paint(axes: "Sequence[Axes]") -> None:
        (ax,) = axes
        left = [0.0] * len(numbered)
        rows = range(len(numbered))
        for phase in PHASES:
            widths = [outcome.phases[phase] for _, outcome in numbered]
            ax.barh(
                rows, widths, left=left, height=0.6, color=COLOURS[f"phase-{phase}"], label=phase
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in zip(rows, left, strict=True):
            ax.annotate(
                f"{total:.0f} ms", (total, row), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=9, color=COLOURS["ink"],
            )  # fmt: skip
        ax.set_yticks(rows, [f"{number} · {outcome.label}" for number, outcome in numbered])
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_xlabel("milliseconds")
        ax.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(PHASES), fontsize=9,
            handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip

    return draw(1.2 + 0.36 * len(numbered), [1], paint)
