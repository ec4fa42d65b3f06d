"""The stripes of a layout: coded ones over all streams, then copies of single runs.

Both who encodes and who decodes derive them from the same values, so no list of units ever travels.
"""

from collections.abc import Iterator, Mapping, Sequence

from outlast.checkpoint.records import ParityRecord, Protection, StateShape
from outlast.checkpoint.stream import stream_bytes, stream_roles
from outlast.layout.layout import Layout
from outlast.layout.run import Run, intersect
from outlast.layout.stripe import ALIGN, Piece, Stripe, parity_bytes, rack_of, stripes


def record_stripes(shape: StateShape, record: ParityRecord) -> tuple[Stripe, ...]:
    """Stripes under which `record` was encoded."""
    domains = {int(holder): domain for holder, domain in record.domains.items()}
    return layout_stripes(shape, Layout.from_json(record.layout), domains, record.protection)


def layout_stripes(
    shape: StateShape, layout: Layout, domains: Mapping[int, str], protection: Protection
) -> tuple[Stripe, ...]:
    """Stripes that protect `layout`, its holders lying in `domains`.

    Copies of `protection.edges` follow the coded stripes: k = 1 and m = 1, each within one role.
    Nothing where all holders share a domain.
    """
    domains = {holder: domains[holder] for holder in layout.holders}
    if len(set(domains.values())) < 2:
        return ()
    coded: tuple[Stripe, ...] = ()
    if protection.m:
        sizes = {h: stream_bytes(shape, layout.runs(h)) for h in layout.holders}
        coded = stripes(sizes, domains, protection.m, protection.group)
    return (*coded, *_mirrors(shape, layout, domains, protection.edges, coded))


def _mirrors(
    shape: StateShape,
    layout: Layout,
    domains: Mapping[int, str],
    edges: Sequence[Run],
    coded: Sequence[Stripe],
) -> Iterator[Stripe]:
    """Each with the holder of another domain that has the least parity, in another rack if any."""
    load = dict.fromkeys(domains, 0) | parity_bytes(coded)
    index = len(coded)
    for holder in layout.holders if edges else ():
        near = [other for other in layout.holders if domains[other] != domains[holder]]
        far = [other for other in near if rack_of(domains[other]) != rack_of(domains[holder])]
        for piece in _pieces(shape, layout, holder, edges):
            length = -(-(piece.stop - piece.start) // ALIGN) * ALIGN
            mirror = min(far or near, key=load.__getitem__)
            load[mirror] += length
            yield Stripe(index, (piece,), (mirror,), length)
            index += 1


def _pieces(
    shape: StateShape, layout: Layout, holder: int, edges: Sequence[Run]
) -> Iterator[Piece]:
    """The stretches of a stream that lie in `edges`."""
    runs, at = layout.runs(holder), 0
    for role in stream_roles(shape):
        begin = end = at
        for run in runs:
            for part in intersect([run], edges):
                start = at + (part.start - run.start) * role.itemsize
                if start != end:
                    if end > begin:
                        yield Piece(holder, begin, end)
                    begin = start
                end = start + part.numel * role.itemsize
            at += run.numel * role.itemsize
        if end > begin:
            yield Piece(holder, begin, end)
