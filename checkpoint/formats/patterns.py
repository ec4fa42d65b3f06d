"""How the slices of tensor-parallel ranks make the whole: DeepSpeed's pattern language, as runs.

A checkpoint says in `universal_checkpoint_info` which parameters are replicated, averaged, cut by
columns, made of several, or padded, by regular expressions on their names; newer ones describe
each parameter as pieces (`affine_map`). Here that is said as runs of the whole: nothing is read.
Source: merge_tp_slices of deepspeed/checkpoint/ds_to_universal.py, which the tests compare with.

>>> patterns = Patterns({"parameter_with_row_parallelism_patterns": [".*out.weight"]})
>>> merge = patterns.merge("layer.out.weight", [(4, 2), (4, 3)])
>>> merge.shape, merge.copies[0][1]
((4, 5), Part(rank=1, start=0, run=Run(start=2, length=3, stride=5, count=4)))
>>> [(at, run.start, run.numel) for at, run in placed(merge.copies[0], 1, 4, 10)]
[(4, 9, 1), (5, 10, 1), (6, 12, 6)]
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from outlast.cluster.errors import Corrupt
from outlast.layout.run import Run

Shape = tuple[int, ...]

REPLICATED, AVERAGED = "tp_replicated_parameter_patterns", "parameter_to_average_patterns"
ROWS = "parameter_with_row_parallelism_patterns"
HALVES, SUBS = "parameter_with_2_sub_params_cat_dim_0", "parameter_with_sub_params"
VOCABULARY = "vocabulary_parameter_patterns"
_WIDTHS_SINCE = 0.4  # version of the language that records how wide every part is on every rank
_PARTS = 1 << 20  # of one parameter
_NAME, _REPEATS, _BRANCHES = 512, 3, 12  # bounds of what a hostile expression can cost


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a rank's slice from `start` on are, in their order, `run` of the whole."""

    rank: int
    start: int
    run: Run


@dataclass(frozen=True, slots=True)
class Merge:
    """How the slices of one parameter make the whole of `shape`.

    Args:
        copies: parts that make the whole, once for every copy that the ranks hold of it. Several
            have to be equal, or the whole is their mean.
        tags: what a universal file says beside its tensor, for those who cut it again.
    """

    shape: Shape
    copies: tuple[tuple[Part, ...], ...]
    averaged: bool
    tags: dict[str, Any]


class Patterns:
    """The patterns of a checkpoint.

    Args:
        info: its `universal_checkpoint_info`.
    Raises:
        Corrupt: it is not of the language, of a newer version, or says itself that some parameter
            cannot be put together.
    """

    def __init__(self, info: Mapping[str, Any]) -> None:
        self._info = info
        try:
            self._version = float(info.get("universal_checkpoint_version", 0.0))
            lists = {key: list(info.get(key, [])) for key in (REPLICATED, AVERAGED, ROWS, HALVES)}
            self._lists = lists | {VOCABULARY: list(info.get(VOCABULARY, []))}
            self._subs = [(p, dict(sub)) for sub in info.get(SUBS, []) for p in sub["patterns"]]
            affine = dict(info.get("affine_map") or {"version": 1, "params": {}})
            self._affine = dict(affine.get("params", {}))
            every = {p for patterns in self._lists.values() for p in patterns}
            every |= {p for p, _ in self._subs}
            self._compiled = {p: _compiled(p) for p in every | set(self._affine)}
        except (TypeError, ValueError, KeyError, AttributeError) as cause:
            raise Corrupt(f"universal_checkpoint_info is not understood: {cause!r}") from cause
        if int(affine.get("version", 1)) > 1:
            raise Corrupt("the affine_map of the checkpoint is of a newer version than 1")
        if unsupported := info.get("autotp_unsupported_parameter_patterns"):
            raise Corrupt(f"DeepSpeed wrote that it cannot describe {unsupported}")
        self.unused = every  # that no name has matched yet: an error in the end, as in DeepSpeed

    def merge(self, name: str, shapes: Sequence[Shape]) -> Merge:
        """How slices of `shapes`, one for each rank, make the parameter `name`.

        Raises:
            Corrupt: they cannot.
        """
        with _fitting(f"{name} of slices {list(shapes)}"):
            kind, rule = self._kind(name)
            shape, copies = self._copies(kind, rule, shapes)
            rows = self._vocabulary(name)
            if rows is not None and rows < shape[0]:
                shape = (rows, *shape[1:])
                copies = tuple(tuple(_below(parts, prod(shape))) for parts in copies)
            return Merge(shape, copies, kind == AVERAGED, self.tags(name, shape))

    def tags(self, name: str, shape: Shape) -> dict[str, Any]:
        """What a universal file says of a whole parameter of `shape`."""
        kind, rule = self._kind(name)
        tags: dict[str, Any] = {}
        if kind == HALVES:
            tags = {"cat_dim": 0, "param_n_sub_params": 2}
        elif kind == SUBS:
            with _fitting(f"{name} {shape}"):
                axis, spec = _axis(sub := rule[1])
                sizes = _sizes(spec, shape[axis])
                entry = [sizes if i == axis else d for i, d in enumerate(sub["shape"])]
                tags = {"sub_param_shape": sub | {"shape": tuple(entry)}}
        elif kind in (ROWS, ""):
            tags = {"cat_dim": int(kind == ROWS)}
        return tags | ({} if self._vocabulary(name) is None else {"vocab_tensor": True})

    def stripped(self, name: str, shape: Shape) -> Shape:
        """The shape of a whole parameter without the padding of a vocabulary."""
        rows = self._vocabulary(name)
        return shape if rows is None else (min(rows, shape[0]), *shape[1:])

    def _vocabulary(self, name: str) -> int | None:
        if self._matched(self._lists[VOCABULARY], name) is None:
            return None
        if not isinstance(rows := self._info.get("original_vocab_size"), int) or rows < 0:
            raise Corrupt(f"{name} is a vocabulary, and original_vocab_size is {rows!r}")
        return rows

    def _kind(self, name: str) -> tuple[str, Any]:
        """Which rule is for `name`, in DeepSpeed's order: the first that matches."""
        sub = next(((p, s) for p, s in self._subs if self._is_match(p, name)), None)
        if (pattern := self._matched(list(self._affine), name)) is not None:
            for patterns in self._lists.values():  # are superseded, and so not unused
                self._matched(patterns, name)
            return "affine", self._affine[pattern]
        for key in (REPLICATED, AVERAGED, HALVES):
            if self._matched(self._lists[key], name) is not None:
                return key, None
        if sub is not None:
            return SUBS, sub
        return (ROWS if self._matched(self._lists[ROWS], name) is not None else ""), None

    def _matched(self, patterns: list[str], name: str) -> str | None:
        found = [pattern for pattern in patterns if self._is_match(pattern, name)]
        if len(found) > 1:
            raise Corrupt(f"{name} matches several patterns of one kind: {found}")
        return found[0] if found else None

    def _is_match(self, pattern: str, name: str) -> bool:
        if len(name) > _NAME:
            raise Corrupt(f"a parameter has a name of {len(name)} characters")
        if self._compiled[pattern].match(name) is None:
            return False
        self.unused.discard(pattern)
        return True

    def _copies(
        self, kind: str, rule: Any, shapes: Sequence[Shape]
    ) -> tuple[Shape, tuple[tuple[Part, ...], ...]]:
        """The whole's shape, and its copies, before a vocabulary is cut."""
        ranks = range(len(shapes))
        if kind == "affine":
            return _affine(rule, shapes)
        if kind in (REPLICATED, AVERAGED):
            if len(set(shapes)) != 1:
                raise ValueError("copies differ in shape")
            whole = [_box(rank, shapes[0]) for rank in ranks]
            return shapes[0], tuple(whole)
        if kind == SUBS:
            pattern, sub = rule
            return self._subparameters(pattern, sub, shapes)
        axis = int(kind == ROWS)
        if len({(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}) != 1:
            raise ValueError(f"slices differ beside dimension {axis}")
        lengths = [shape[axis] for shape in shapes]
        if kind == HALVES and min(lengths) < 2:
            raise ValueError("a slice has no second half")
        widths = [lengths] if kind != HALVES else [
            [-(-n // 2) for n in lengths], [n // 2 for n in lengths]
        ]  # fmt: skip
        shape = (*shapes[0][:axis], sum(lengths), *shapes[0][axis + 1 :])
        return shape, (_cut(shape, axis, widths),)

    def _subparameters(
        self, pattern: str, sub: dict[str, Any], shapes: Sequence[Shape]
    ) -> tuple[Shape, tuple[tuple[Part, ...], ...]]:
        axis, spec = _axis(sub)
        if self._version >= _WIDTHS_SINCE:
            widths = [list(map(int, row)) for row in self._info["sub_param_shard_widths"][pattern]]
            sizes = _sizes(spec, sum(map(sum, widths)))
        else:
            sizes = _sizes(spec, sum(shape[axis] for shape in shapes))
            if any(size % len(shapes) for size in sizes):
                raise ValueError(f"parts of {sizes} are not even, and no widths are recorded")
            widths = [[size // len(shapes)] * len(shapes) for size in sizes]
        if [*sizes] != [sum(row) for row in widths] or min(map(min, widths)) < 0:
            raise ValueError(f"widths {widths} do not make parts of {sizes}")
        shape = _whole(sub["shape"], axis, sum(sizes), sum(map(prod, shapes)))
        inner = prod(shape[:axis]) * prod(shape[axis + 1 :])
        if [sum(row) * inner for row in zip(*widths, strict=True)] != [*map(prod, shapes)]:
            raise ValueError(f"widths {widths} are not those of the slices")
        return shape, (_cut(shape, axis, widths),)


@contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Corrupt for what a pattern says and the shapes do not."""
    try:
        yield
    except (TypeError, ValueError, LookupError, OverflowError) as cause:
        raise Corrupt(f"{what} does not fit its pattern: {cause}") from cause


def placed(parts: Iterable[Part], rank: int, first: int, last: int) -> Iterator[tuple[int, Run]]:
    """Elements [first, last) of a rank's slice: (where in the slice, as which run of the whole)."""
    for part in parts:
        low, high = max(first, part.start), min(last, part.start + part.run.numel)
        if part.rank == rank and low < high:
            for at, run in _stretch(part.run, low - part.start, high - part.start):
                yield part.start + at, run


def _compiled(pattern: str) -> re.Pattern[str]:
    """An expression that cannot take long: few repetitions and branches, no repeated group."""
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern).replace("(?:", "(")
    loops, branches = len(re.findall(r"[*+?{]", bare)), bare.count("|")
    if loops > _REPEATS or branches > _BRANCHES or re.search(r"\)[*+{]", bare):
        raise Corrupt(f"{pattern!r} may take for ever to match: it is not used")
    try:
        return re.compile(pattern)
    except re.error as cause:
        raise Corrupt(f"{pattern!r} is no pattern: {cause}") from cause


def _axis(sub: dict[str, Any]) -> tuple[int, Any]:
    """Along which dimension a parameter is made of others, and what is said of their sizes."""
    axis = int(sub["partition_dim"])
    if not 0 <= axis < len(sub["shape"]):
        raise ValueError(f"dimension {axis} of {sub['shape']}")
    return axis, sub["shape"][axis]


def _box(rank: int, shape: Shape) -> tuple[Part, ...]:
    """The whole in one part; nothing for an empty one."""
    return (Part(rank, 0, Run.of(0, prod(shape))),) if prod(shape) else ()


def _cut(shape: Shape, axis: int, widths: list[list[int]]) -> tuple[Part, ...]:
    """A whole made of parts along `axis`, each cut over the ranks: `widths[part][rank]`."""
    outer, inner = prod(shape[:axis]), prod(shape[axis + 1 :])
    rows = [sum(row) for row in zip(*widths, strict=True)]  # how wide is a rank's slice
    if outer * len(widths) * len(rows) > _PARTS and len(widths) > 1:
        raise ValueError(f"it is cut into more than {_PARTS} parts")
    parts, begin, at = [], [0] * len(rows), 0
    for row in widths if outer * inner else ():
        for rank, width in enumerate(row):
            length, stride = width * inner, sum(rows) * inner
            if width and width == rows[rank]:
                parts.append(Part(rank, 0, Run(at * inner, length, stride, outer)))
            elif width:  # the slice has other parts between these rows
                starts = range(at * inner, at * inner + outer * stride, stride)
                step = rows[rank] * inner
                parts += [
                    Part(rank, begin[rank] * inner + index * step, Run(start, length))
                    for index, start in enumerate(starts)
                ]
            begin[rank] += width
            at += width
    return tuple(parts)


def _stretch(run: Run, first: int, last: int) -> Iterator[tuple[int, Run]]:
    """Elements first..last-1 of a run, in its order, as runs: each with the number of its first."""
    while first < last:
        row, inside = divmod(first, run.length)
        rows = 0 if inside else (last - first) // run.length
        if rows:
            piece = run.rows(row, row + rows)[0]
        else:
            length = min(last - first, run.length - inside)
            piece = Run(run.start + row * run.stride + inside, length)
        yield first, piece
        first += piece.numel


def _below(parts: Iterable[Part], limit: int) -> Iterator[Part]:
    """What of the parts lies in [0, limit) of the whole."""
    for part in parts:
        run = part.run
        full, rest = divmod(max(limit - run.start, 0), run.stride or run.length)
        kept = min(full, run.count) * run.length + min(rest, run.length) * (full < run.count)
        for at, piece in _stretch(run, 0, kept):
            yield Part(part.rank, part.start + at, piece)


def _sizes(spec: Any, length: int) -> tuple[int, ...]:
    """Sizes of the parts that fill `length`: they are listed, or it is only said how many."""
    if isinstance(spec, list | tuple):
        return tuple(map(int, spec))
    if not 0 < spec <= _PARTS or length % spec:
        raise ValueError(f"{length} elements are not {spec} even parts")
    return (length // spec,) * int(spec)


def _whole(dimensions: Sequence[Any], axis: int, length: int, total: int) -> Shape:
    """The declared shape: `length` along `axis`, and the one that is -1 as `total` needs it."""
    shape = [sum(d) if isinstance(d, list | tuple) else int(d) for d in dimensions]
    shape[axis] = length
    if (free := [i for i, d in enumerate(shape) if d < 0]) and total:
        known = prod(d for d in shape if d >= 0)
        if len(free) > 1 or not known or total % known:
            raise ValueError(f"{total} elements are not of the shape {shape}")
        shape[free[0]] = total // known
    return tuple(shape)


def _affine(rule: Any, shapes: Sequence[Shape]) -> tuple[Shape, tuple[tuple[Part, ...], ...]]:
    """Pieces of an affine map: as many copies as the ranks hold of what they hold most of."""
    shape, pieces = tuple(map(int, rule["logical_shape"])), []
    ranks = {int(rank): value["pieces"] for rank, value in rule["ranks"].items()}
    if set(ranks) != set(range(len(shapes))):
        raise ValueError(f"the map is for ranks {sorted(ranks)}")
    for rank, mine in sorted(ranks.items()):
        if sum(prod(piece["shape"]) for piece in mine) != prod(shapes[rank]):
            raise ValueError(f"the map is not that of the slice of rank {rank}")
        for piece in mine:
            if piece.get("scale", 1.0) != 1.0:
                raise ValueError("a scaled piece: Adam's lr and eps would have to be scaled, too")
            pieces.append((rank, sorted(map(int, piece["locations"])), piece))
    count = max((len(locations) for _, locations, _ in pieces), default=1)
    if count > len(shapes):
        raise ValueError("a piece is in more places than there are ranks")
    return shape, tuple(
        tuple(
            part
            for rank, locations, piece in pieces
            if rank == locations[copy % len(locations)]
            for part in _strided(rank, piece)
        )
        for copy in range(count)
    )


def _strided(rank: int, piece: dict[str, Any]) -> Iterator[Part]:
    """The parts of one block of elements with strides in the whole and in the slice."""
    (source, inward), (start, outward) = piece["source"], piece["dest"]
    axes = [
        (int(size), int(step), int(skip))
        for size, step, skip in zip(piece["shape"], inward, outward, strict=True)
        if size != 1
    ]
    if not prod(size for size, _, _ in axes):
        return
    length, count, stride = 1, 1, 0
    while axes and axes[-1][1:] == (length, length):  # one interval in both
        length *= axes.pop()[0]
    if axes and axes[-1][2] == length:  # intervals that follow each other in the slice
        count, stride, _ = axes.pop()
    if prod(size for size, _, _ in axes) > _PARTS:
        raise ValueError(f"it is cut into more than {_PARTS} parts")
    for index in product(*(range(size) for size, _, _ in axes)):
        steps = list(zip(index, axes, strict=True))
        begin = source + sum(i * inward for i, (_, inward, _) in steps)
        at = start + sum(i * outward for i, (_, _, outward) in steps)
        yield Part(rank, at, Run(begin, length, stride, count))
