import contextlib
import random
import struct

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from builders import refuses
from ppf.errors import DamagedError
from ppf.llm.gguf_structure import check_structure


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def tensor(name="t", shape=(4,), kind=0, offset=0, dimensions=None):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return (
        text(name) + struct.pack("<I", len(shape) if dimensions is None else dimensions) + sizes + struct.pack("<IQ", kind, offset)
    )


def file(keys=(), tensors=(), magic=b"GGUF", version=3, counts=None, data=b"\0" * 64, align=32):
    many = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, *many) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % align) + data


U8, U32 = 0, 4
GOOD = {
    "nothing but a head": file(), "version 2": file(version=2), "a key": file([key("a", U32, b"\1\0\0\0")]),
    "a list": file([key("a", 9, struct.pack("<IQ", 8, 2) + text("x") + text(""))]),
    "two tensors": file(tensors=[tensor("a"), tensor("b", offset=32)]),
    "another alignment": file([key("general.alignment", U32, struct.pack("<I", 64))], [tensor()], align=64),
    "blocks": file(tensors=[tensor(shape=(32,), kind=8)]),
}  # fmt: skip
BAD = {
    "magic": file(magic=b"GGUE"), "version 0": file(version=0), "version 1": file(version=1), "version 4": file(version=4),
    "big-endian": file(version=3 << 24), "cut magic": b"GG", "cut counts": file()[:20], "too many tensors": file(counts=(2**63, 0)),
    "too many keys": file(counts=(0, 2**63)), "one key too few": file(counts=(0, 9), data=b""),
    "a key without end": file([struct.pack("<Q", 2**60)]), "a name that is no UTF-8": file([key(b"\xff", U8, b"\0")]),
    "a type that is none": file([key("a", 13, b"\0" * 8)]), "a huge type": file([key("a", 2**31, b"\0" * 8)]),
    "a key twice": file([key("a", U8, b"\0"), key("a", U8, b"\1")]), "a bool of two": file([key("a", 7, b"\2")]),
    "a text without end": file([key("a", 8, struct.pack("<Q", 2**63))]),
    "a text that is no UTF-8": file([key("a", 8, text(b"\xff"))]),
    "a list without end": file([key("a", 9, struct.pack("<IQ", U8, 2**63))]),
    "a list of texts without end": file([key("a", 9, struct.pack("<IQ", 8, 2**40))]),
    "a list of nothing": file([key("a", 9, struct.pack("<IQ", 99, 1))]),
    "a list of lists": file([key("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", U8, 0))]),
    "no alignment": file([key("general.alignment", U32, b"\0" * 4)]),
    "an odd alignment": file([key("general.alignment", U32, struct.pack("<I", 33))]),
    "an alignment of text": file([key("general.alignment", 8, text("32"))]),
    "a long name": file(tensors=[tensor("x" * 64)]), "no dimension": file(tensors=[tensor(shape=(), dimensions=0)]),
    "five dimensions": file(tensors=[tensor(shape=(1,) * 5)]),
    "dimensions without end": file(tensors=[tensor(dimensions=2**32 - 1)]),
    "an empty tensor": file(tensors=[tensor(shape=(0,))]), "a huge tensor": file(tensors=[tensor(shape=(2**62, 2**62))]),
    "a tensor type that is none": file(tensors=[tensor(kind=999)]), "half a block": file(tensors=[tensor(shape=(31,), kind=8)]),
    "a tensor twice": file(tensors=[tensor("a"), tensor("a", offset=32)]), "an odd offset": file(tensors=[tensor(offset=4)]),
    "tensors that overlap": file(tensors=[tensor("a", shape=(16,)), tensor("b", offset=32)]),
    "a tensor beyond the end": file(tensors=[tensor(offset=64)]), "no data": file(tensors=[tensor()], data=b""), "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_what_the_format_allows_passes(tmp_path, kind):
    (tmp_path / "f").write_bytes(GOOD[kind])
    assert check_structure(tmp_path / "f") == (len(GGUFReader(tmp_path / "f").fields) - 3, len(GGUFReader(tmp_path / "f").tensors))


@pytest.mark.parametrize("kind", BAD)
def test_what_it_does_not_is_refused(tmp_path, kind):
    (tmp_path / "f").write_bytes(BAD[kind])
    with refuses(DamagedError):
        check_structure(tmp_path / "f")


def written(path):
    """A small file as the gguf package writes it."""
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", "tiny")
    writer.add_array("tokens", ["a", "bc", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("a.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("b.weight", np.arange(32, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("count", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_mutant_that_passes_keeps_the_reader_busy_or_breaks_it(tmp_path, count):
    data, rng, passed = written(tmp_path / "whole"), random.Random(0), 0
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        (tmp_path / "f").write_bytes(mutant[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        try:
            check_structure(tmp_path / "f")
        except DamagedError:
            continue
        passed += 1
        with contextlib.suppress(ValueError, KeyError, IndexError, OverflowError):  # it knows more of the values of some keys
            GGUFReader(tmp_path / "f")
    assert passed > count / 50
