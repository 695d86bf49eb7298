"""What has to be finished before an instance may start, from the bytes that instances read and write.

    read after write     the rows it needs, of every instance whose rows are numbered like its own; else all
    write after read     all
    write after write    all

With a row mode each task of the reader waits for the rows it needs; ALL waits for the whole writer. Channels
count too: values that are slices of the same pixels do not touch each other. Such a map of C channels is a
table whose rows are pixels; who wrote and who read is known for each band of columns:

    pixels [first, end) of a buffer     | x0 (conv0)   | x1 (layer 1) | x2 (layer 2) | not written yet |

Bytes that were used with other pixels before belong to everybody who had to do with them (`before`), until
every channel has been written anew.

A dependency that follows from others is left out. Once any task of an instance has run, everything that
instance waited for completely is done; and when an instance reads the pixels that it writes, the rows it has
written imply the same rows of what it read: a dense layer need not wait for every earlier layer by itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

ALL, INPUT_ROWS, RESIDUAL_ROWS = 0, 1, 2  # the modes of the native plan


class Columns(NamedTuple):
    """Channels [first, end) of pixels; below `gap` there is nothing. key: begin and size of a pixel."""

    key: tuple[int, int]
    first: int
    end: int
    gap: int = 0


WHOLE = Columns((0, 1), 0, 1)


class Extent(NamedTuple):
    slot: int
    first: int  # byte
    end: int
    columns: Columns = WHOLE


@dataclass
class Access:
    """What one instance touches. reads: (extent, mode to use when rows are numbered alike).

    same_rows: a task that writes a pixel reads that pixel of x, when x is read by rows.
    """

    reads: list[tuple[Extent, int]]
    writes: list[Extent]
    same_rows: bool = False


@dataclass
class _Band:
    first: int
    end: int
    writer: int
    whole: bool  # the pixels of the span are all that the writer wrote
    readers: list[int] = field(default_factory=list)

    def part(self, first: int, end: int) -> _Band:
        return _Band(first, end, self.writer, self.whole, list(self.readers))


@dataclass
class _Span:
    first: int
    end: int
    key: tuple[int, int] | None = None
    bands: list[_Band] = field(default_factory=list)
    before: set[int] = field(default_factory=set)  # had to do with these bytes in other ways
    beneath: set[int] = field(default_factory=set)  # the same, but only with channels below `gap`
    gap: int = 0

    def everybody(self) -> set[int]:
        found = self.before | self.beneath
        for band in self.bands:
            found.update(band.readers, (band.writer,))
        return found

    def earlier(self, columns: Columns) -> set[int]:
        """Who had to do with bytes of these channels when there were other pixels here."""
        return self.before | self.beneath if columns.first < self.gap else set(self.before)

    def cover(self, columns: Columns) -> None:
        """Forget what was before once every channel is new; nobody writes those below the gap."""
        at = columns.gap
        for band in self.bands:
            at = band.end if band.first <= at else at
        if at < columns.key[1]:
            return
        self.beneath = self.beneath | self.before if columns.gap else set()
        self.gap = max(self.gap, columns.gap) if columns.gap else 0
        self.before.clear()


class _Memory:
    """One slot: disjoint spans in order of address."""

    def __init__(self) -> None:
        self.spans: list[_Span] = []
        self.starts: list[int] = []

    def cut(self, first: int, end: int) -> tuple[int, int]:
        """The indices of the spans that make up [first, end) exactly; makes spans where there were none."""
        self._split(first)
        self._split(end)
        begin = index = bisect_left(self.starts, first)
        position = first
        while position < end:
            known = index < len(self.spans) and self.spans[index].first == position
            if not known:
                stop = end if index == len(self.spans) else min(end, self.spans[index].first)
                self._insert(index, _Span(position, stop))
            position = self.spans[index].end
            index += 1
        return begin, index

    def join(self, begin: int, end: int, key: tuple[int, int]) -> _Span:
        """One span in place of several; bands survive when it was one, with the same pixels."""
        spans = self.spans[begin:end]
        joined = spans[0]
        if len(spans) > 1 or joined.key != key:
            before = set().union(*(span.everybody() for span in spans))
            joined = _Span(spans[0].first, spans[-1].end, key, [], before)
        self.spans[begin:end] = [joined]
        self.starts[begin:end] = [joined.first]
        return joined

    def _insert(self, index: int, span: _Span) -> None:
        self.spans.insert(index, span)
        self.starts.insert(index, span.first)

    def _split(self, at: int) -> None:
        index = bisect_right(self.starts, at) - 1
        if index < 0 or not self.spans[index].first < at < self.spans[index].end:
            return
        span = self.spans[index]
        for band in span.bands:
            band.whole = False
        bands = [band.part(band.first, band.end) for band in span.bands]
        right = _Span(at, span.end, span.key, bands, set(span.before), set(span.beneath), span.gap)
        span.end = at
        self._insert(index + 1, right)


Modes = dict[int, set[int]]


def dependencies(accesses: Iterable[Access]) -> list[list[tuple[int, int]]]:
    """For each instance, in order: [(earlier instance, mode)], without those that follow from others."""
    memory: dict[int, _Memory] = {}
    found: list[list[tuple[int, int]]] = []
    known = _Known()
    for number, access in enumerate(accesses):
        modes: Modes = {}
        for extent, mode in access.reads:
            extent = Extent(*extent)
            _read(memory.setdefault(extent.slot, _Memory()), extent, number, mode, modes)
        for extent in access.writes:
            extent = Extent(*extent)
            _write(memory.setdefault(extent.slot, _Memory()), extent, number, modes)
        modes.pop(number, None)
        found.append(known.add(modes, access.same_rows))
    return found


def _read(memory: _Memory, extent: Extent, reader: int, mode: int, modes: Modes) -> None:
    begin, end = memory.cut(extent.first, extent.end)
    spans, columns = memory.spans[begin:end], extent.columns
    for span in spans:
        alike = len(spans) == 1 and span.key == columns.key
        if span.key != columns.key:
            for other in span.everybody():
                modes.setdefault(other, set()).add(ALL)
            span.before.add(reader)
            continue
        for other in span.earlier(columns):
            modes.setdefault(other, set()).add(ALL)
        if span.before:  # what it reads may have been written by one of them
            span.before.add(reader)
        if columns.first < span.gap:
            span.beneath.add(reader)
        for band in span.bands:
            if band.first < columns.end and columns.first < band.end:
                band.readers.append(reader)
                modes.setdefault(band.writer, set()).add(mode if alike and band.whole else ALL)


def _write(memory: _Memory, extent: Extent, writer: int, modes: Modes) -> None:
    begin, end = memory.cut(extent.first, extent.end)
    if begin == end:
        return
    columns = extent.columns
    span = memory.join(begin, end, columns.key)
    others = span.earlier(columns)
    kept: list[_Band] = []
    for band in span.bands:
        if band.end <= columns.first or columns.end <= band.first:
            kept.append(band)
            continue
        others.update(band.readers, (band.writer,))
        kept += [band.part(band.first, columns.first)] if band.first < columns.first else []
        kept += [band.part(columns.end, band.end)] if columns.end < band.end else []
    for other in others:
        modes.setdefault(other, set()).add(ALL)
    span.bands = sorted([*kept, _Band(columns.first, columns.end, writer, True)], key=lambda band: band.first)
    span.cover(columns)


class _Known:
    """What follows from having waited for an instance, as bits: bit i stands for instance i."""

    def __init__(self) -> None:
        self.done: list[int] = []  # complete once any task of k has run
        self.rows: list[int] = []  # have written the pixels that tasks of k have written

    def add(self, modes: Modes, same_rows: bool) -> list[tuple[int, int]]:
        """The dependencies of the next instance, without those that follow."""
        needed = self._without_rows(self._without_done(modes))
        self.done.append(self._done_by(needed))
        by_rows = {RESIDUAL_ROWS, INPUT_ROWS} if same_rows else {RESIDUAL_ROWS}
        rows = self.done[-1]
        for other, mode in needed:
            rows |= self.rows[other] | 1 << other if mode in by_rows else 0
        self.rows.append(rows)
        return needed

    def _done_by(self, needed: list[tuple[int, int]]) -> int:
        """A residual's rows imply nothing: tasks of a first phase (Winograd's) do not wait for them."""
        bits = 0
        for other, mode in needed:
            if mode == ALL:
                bits |= self.done[other] | 1 << other
            elif mode == INPUT_ROWS:
                bits |= self.done[other]
        return bits

    def _without_done(self, modes: Modes) -> list[tuple[int, int]]:
        needed: list[tuple[int, int]] = []
        known = 0
        for other in sorted(modes, reverse=True):  # the latest implies the most
            if known >> other & 1:
                continue
            wanted = {ALL} if ALL in modes[other] else modes[other]
            needed += [(other, mode) for mode in wanted]
            known |= self._done_by([(other, mode) for mode in wanted])
        return sorted(needed)

    def _without_rows(self, needed: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Without rows of an instance that another one, awaited in the same mode, has waited for itself."""
        kept: list[tuple[int, int]] = []
        known = {INPUT_ROWS: 0, RESIDUAL_ROWS: 0}
        for other, mode in reversed(needed):
            if mode != ALL and known[mode] >> other & 1:
                continue
            kept.append((other, mode))
            if mode != ALL:
                known[mode] |= self.rows[other]
        return sorted(kept)
