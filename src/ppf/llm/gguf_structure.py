"""The bounds of a GGUF file, checked before the reader of the gguf package, which a damaged length may keep busy for ever.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import math
import mmap
from pathlib import Path

from ppf.errors import DamagedError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type -> bytes."""
_TEXT, _LIST = 8, 9
_MOST_DIMENSIONS, _MOST_NAME = 4, 64
_ALIGNMENT = b"general.alignment"


def check_structure(file: Path) -> tuple[int, int]:
    """Walks through everything in front of the weights, and makes sure that they lie in the file and apart.

    Args:
        file: The GGUF file.

    Returns:
        How many keys and how many tensors it has.

    Raises:
        DamagedError: A number in it leads outside the file, or it is no GGUF file.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    blocks = {kind.value: GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data, len(data)).all(blocks)
    except ValueError as error:
        raise DamagedError(f"{file} must be a whole GGUF file; {error}; write it again") from error


class _Walk:
    """A place in a file that only moves on, and never beyond its end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self._size, self._at = data, size, 0

    def all(self, blocks: dict[int, tuple[int, int]]) -> tuple[int, int]:
        if self._take(4) != b"GGUF" or self._number(4) not in (2, 3):
            raise ValueError("it does not begin as one of version 2 or 3")
        tensors, keys = self._number(8), self._number(8)
        names, alignment = set[bytes](), 32
        for _ in range(self._bounded(keys, 13)):
            name = self._text()
            kind = self._number(4)
            value = self._value(kind)
            if name in names:
                raise ValueError("a key is there twice")
            names.add(name)
            if name == _ALIGNMENT:
                alignment = int.from_bytes(value, "little") if kind == 4 else 0
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError("its alignment is no power of two")
        entries = [self._tensor(blocks) for _ in range(self._bounded(tensors, 24))]
        if len({name for name, _, _ in entries}) != len(entries):
            raise ValueError("a tensor is there twice")
        self._check_apart([(start, size) for _, start, size in entries], alignment)
        return keys, tensors

    def _check_apart(self, spans: list[tuple[int, int]], alignment: int) -> None:
        begin, end = -(-self._at // alignment) * alignment, 0
        for start, size in sorted(spans):
            if start % alignment or start < end or begin + start + size > self._size:
                raise ValueError("tensors overlap, are not aligned, or reach beyond its end")
            end = start + size

    def _tensor(self, blocks: dict[int, tuple[int, int]]) -> tuple[bytes, int, int]:
        """Name, offset and bytes."""
        name = self._text()
        dimensions = self._number(4)
        if len(name) >= _MOST_NAME or not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError("a tensor has no such name or number of dimensions")
        shape = [self._number(8) for _ in range(dimensions)]
        kind, offset = self._number(4), self._number(8)
        block, size = blocks.get(kind, (0, 0))
        if not block or min(shape) < 1 or shape[0] % block:
            raise ValueError("a tensor has no such type or shape")
        return name, offset, math.prod(shape) // block * size

    def _value(self, kind: int, depth: int = 0) -> bytes:
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            if kind not in _SIZES:
                raise ValueError("a value has no such type")
            value = self._take(_SIZES[kind])
            if kind == 7 and value not in (b"\0", b"\1"):
                raise ValueError("a truth value is neither true nor false")
            return value
        if depth:
            raise ValueError("a list holds lists")
        inner, count = self._number(4), self._number(8)
        if inner in _SIZES:
            return self._take(self._bounded(count, _SIZES[inner]) * _SIZES[inner])
        for _ in range(self._bounded(count, 8)):
            self._value(inner, depth + 1)
        return b""

    def _text(self) -> bytes:
        text = self._take(self._number(8))
        text.decode()  # a UnicodeDecodeError is a ValueError
        return text

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _bounded(self, count: int, least: int) -> int:
        """A count of things that take so many bytes each at least."""
        if count * least > self._size - self._at:
            raise ValueError("it announces more than it holds")
        return count

    def _take(self, size: int) -> bytes:
        if size > self._size - self._at:
            raise ValueError("it ends too early")
        self._at += size
        return self._data[self._at - size : self._at]
