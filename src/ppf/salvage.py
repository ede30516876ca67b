"""Samples out of the pages of a damaged store, whatever SQLite says of the file: its header, its schema and its tree may be gone.

A table's rows lie in leaf pages, each of which says where its rows begin. They are read page by page, of the database and of
its write-ahead log, and a row counts only if its CRC holds.

Reference: https://www.sqlite.org/fileformat2.html, sections 1.6, 2.1 and 4.1.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ppf.errors import ResourceError
from ppf.samples import REALS, Sample, whole_row

_LEAF = 0x0D
_WAL = (0x377F0682, 0x377F0683)
_HEADER = {"database": 100, "wal": 32, "frame": 24}
_USUAL = 4096
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
"""Serial type -> bytes."""
_BROKEN = (IndexError, ValueError, struct.error)


def salvage(files: Iterable[Path]) -> list[Sample]:
    """Every whole sample of some stores.

    Args:
        files: Databases and write-ahead logs, in any state; where they hold one mask's sample more than once, a finished
            one comes before a failed one, and the later before the earlier.

    Returns:
        One sample for each context and mask, in the order in which they were stored.

    Raises:
        ResourceError: A file cannot be read.
    """
    found: dict[tuple[str, str], tuple[tuple[bool, int], Sample]] = {}
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ResourceError(f"{path} must be readable; {error.strerror}; check its permissions") from error
        for row, sample in _samples(_pages(data)):
            rank = (sample.status == "done", row)
            key = (sample.context, sample.digest)
            if key not in found or rank >= found[key][0]:
                found[key] = (rank, sample)
    return [sample for (_, _), sample in sorted(found.values(), key=lambda item: item[0][1])]


def _pages(data: bytes) -> list[tuple[int, bytes]]:
    """(Number, content) of each page; a log may hold a page more than once."""
    if len(data) >= _HEADER["wal"] and int.from_bytes(data[:4], "big") in _WAL:
        size, step = int.from_bytes(data[8:12], "big"), _HEADER["frame"]
        size = size if _is_page_size(size) else _USUAL
        starts = range(_HEADER["wal"], len(data), size + step)
        return [(int.from_bytes(data[start : start + 4], "big"), _page(data, start + step, size)) for start in starts]
    size = int.from_bytes(data[16:18], "big")
    size = 65536 if size == 1 else size if _is_page_size(size) else _USUAL
    return [(number, _page(data, start, size)) for number, start in enumerate(range(0, len(data), size), 1)]


def _page(data: bytes, start: int, size: int) -> bytes:
    """A page that is cut is filled up: what it holds lies where it would."""
    return data[start : start + size].ljust(size, b"\0")


def _is_page_size(size: int) -> bool:
    return 512 <= size <= 65536 and size & (size - 1) == 0


def _samples(pages: list[tuple[int, bytes]]) -> Iterator[tuple[int, Sample]]:
    """(Row number, sample) of each whole row."""
    by_number = dict(pages)
    for _, page in pages:
        for start in _HEADER["database"], 0:  # the first page of a database begins behind the header of the file
            if page[start] == _LEAF:
                yield from _rows(page, start, by_number)


def _rows(page: bytes, start: int, by_number: dict[int, bytes]) -> Iterator[tuple[int, Sample]]:
    count = int.from_bytes(page[start + 3 : start + 5], "big")
    for place in range(start + 8, min(start + 8 + 2 * count, len(page) - 1), 2):
        try:
            begin = int.from_bytes(page[place : place + 2], "big") % len(page)  # as SQLite takes it
            number, values = _row(page, begin, by_number)
            sample = whole_row(values)
        except _BROKEN:
            continue
        if sample is not None:
            yield number, sample


def _row(page: bytes, place: int, by_number: dict[int, bytes]) -> tuple[int, list[Any]]:
    """The number and the values of the row that begins at ``place``."""
    length, place = _varint(page, place)
    number, place = _varint(page, place)
    usable = len(page)
    if length > usable * max(len(by_number), 1):
        raise ValueError("longer than the file")
    if length <= usable - 35:
        return number, _values(page[place : place + length])
    least = (usable - 12) * 32 // 255 - 23
    here = least + (length - least) % (usable - 4)
    here = here if here <= usable - 35 else least
    payload, following = bytearray(page[place : place + here]), int.from_bytes(page[place + here : place + here + 4], "big")
    seen = set[int]()
    while len(payload) < length:
        more = by_number.get(following, b"")
        if len(more) < 5 or following in seen:
            raise ValueError("a page is missing, or leads back")
        seen.add(following)
        payload += more[4:]
        following = int.from_bytes(more[:4], "big")
    return number, _values(bytes(payload[:length]))


def _values(payload: bytes) -> list[Any]:
    """The columns of a record, as SQLite gives them."""
    end, place = _varint(payload, 0)
    kinds = []
    while place < end:
        kind, place = _varint(payload, place)
        kinds.append(kind)
    values: list[Any] = []
    for column, kind in enumerate(kinds):
        value, place = _value(payload, place, kind)
        # A whole number in a column of reals is stored as an integer.
        values.append(float(value) if column in REALS and isinstance(value, int) else value)
    return values


def _value(payload: bytes, place: int, kind: int) -> tuple[Any, int]:
    if kind in (0, 8, 9):
        return {0: None, 8: 0, 9: 1}[kind], place
    size = _INTEGERS.get(kind, 8 if kind == 7 else (kind - 12) // 2)
    raw = payload[place : place + size]
    if kind in (10, 11) or len(raw) < size:
        raise ValueError("no such value")
    if kind in _INTEGERS:
        return int.from_bytes(raw, "big", signed=True), place + size
    if kind == 7:
        return struct.unpack(">d", raw)[0], place + size
    return raw.decode(errors="surrogateescape") if kind % 2 else raw, place + size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of 1 to 9 bytes, and where it ends."""
    value = 0
    for index in range(8):
        byte = data[place + index]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, place + index + 1
    return value << 8 | data[place + 8], place + 9
