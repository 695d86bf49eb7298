"""What has to be finished before an instance may start, from the bytes that instances read and write.

    read after write     the rows it needs, if it reads exactly what one earlier instance wrote; else all
    write after read     all
    write after write    all

With a row mode each task of the reader waits for the rows it needs; ALL waits for the whole writer. A
dependency that follows from others is left out: once any task of an instance has run, everything that
instance waited for completely is done.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

ALL, INPUT_ROWS, RESIDUAL_ROWS = 0, 1, 2  # the modes of the native plan
Extent = tuple[int, int, int]  # slot, first byte, end byte


@dataclass
class Access:
    """What one instance touches. reads: (extent, mode to use when it is exactly what one instance wrote)."""

    reads: list[tuple[Extent, int]]
    writes: list[Extent]


@dataclass
class _Span:
    first: int
    end: int
    writer: int | None
    whole: bool  # this span is all that the writer wrote
    readers: list[int] = field(default_factory=list)


class _Memory:
    """Who wrote and who has since read each byte of one slot: disjoint spans in order of address."""

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
                self._insert(index, _Span(position, stop, None, False))
            position = self.spans[index].end
            index += 1
        return begin, index

    def replace(self, begin: int, end: int, span: _Span) -> None:
        self.spans[begin:end] = [span]
        self.starts[begin:end] = [span.first]

    def _insert(self, index: int, span: _Span) -> None:
        self.spans.insert(index, span)
        self.starts.insert(index, span.first)

    def _split(self, at: int) -> None:
        index = bisect_right(self.starts, at) - 1
        if index < 0 or not self.spans[index].first < at < self.spans[index].end:
            return
        span = self.spans[index]
        right = _Span(at, span.end, span.writer, False, list(span.readers))
        span.end, span.whole = at, False
        self._insert(index + 1, right)


def dependencies(accesses: Iterable[Access]) -> list[list[tuple[int, int]]]:
    """For each instance, in order: [(earlier instance, mode)], without those that follow from others."""
    memory: dict[int, _Memory] = {}
    found: list[list[tuple[int, int]]] = []
    implied: list[int] = []  # bit i of implied[k]: instance i is finished once any task of k has run
    for number, access in enumerate(accesses):
        modes: dict[int, set[int]] = {}
        for extent, mode in access.reads:
            _read(memory.setdefault(extent[0], _Memory()), extent, number, mode, modes)
        for extent in access.writes:
            _write(memory.setdefault(extent[0], _Memory()), extent, number, modes)
        modes.pop(number, None)
        needed = _reduce(modes, implied)
        implied.append(_implied_by(needed, implied))
        found.append(needed)
    return found


def _read(memory: _Memory, extent: Extent, reader: int, mode: int, modes: dict[int, set[int]]) -> None:
    begin, end = memory.cut(extent[1], extent[2])
    spans = memory.spans[begin:end]
    exact = len(spans) == 1 and spans[0].whole
    for span in spans:
        span.readers.append(reader)
        if span.writer is not None:
            modes.setdefault(span.writer, set()).add(mode if exact else ALL)


def _write(memory: _Memory, extent: Extent, writer: int, modes: dict[int, set[int]]) -> None:
    begin, end = memory.cut(extent[1], extent[2])
    if begin == end:
        return
    for span in memory.spans[begin:end]:
        for other in (*span.readers, span.writer):
            if other is not None:
                modes.setdefault(other, set()).add(ALL)
    memory.replace(begin, end, _Span(extent[1], extent[2], writer, True))


def _implied_by(needed: list[tuple[int, int]], implied: list[int]) -> int:
    """A residual's rows imply nothing: tasks of a first phase (Winograd's) do not wait for them."""
    bits = 0
    for other, mode in needed:
        if mode == ALL:
            bits |= implied[other] | 1 << other
        elif mode == INPUT_ROWS:
            bits |= implied[other]
    return bits


def _reduce(modes: dict[int, set[int]], implied: list[int]) -> list[tuple[int, int]]:
    """Without those that are complete anyway by the time another one has started."""
    needed: list[tuple[int, int]] = []
    known = 0
    for other in sorted(modes, reverse=True):  # the latest implies the most
        if known >> other & 1:
            continue
        wanted = {ALL} if ALL in modes[other] else modes[other]
        needed += [(other, mode) for mode in wanted]
        known |= _implied_by([(other, mode) for mode in wanted], implied)
    return sorted(needed)
