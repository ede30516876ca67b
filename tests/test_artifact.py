import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from builders import examples, full_disk, interrupted, names_in, refuses
from ppf import artifact
from ppf.artifact import atomic_folder, load_artifact, read_json, save_artifact, write_bytes, write_json
from ppf.errors import DamagedError, ResourceError

DTYPES = ["float64", "float32", "float16", "int64", "int32", "uint8", "bool"]
ARRAYS = {"weights": np.arange(6, dtype=np.float32).reshape(2, 3), "bits": np.array([True, False])}


@pytest.fixture
def umask():
    """Lets a test set the umask and puts the old one back."""
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


def saved(folder):
    save_artifact(folder / "a.safetensors", "thing", "f" * 8, ARRAYS, seed=3)
    return folder / "a.safetensors"


def exact(arrays):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


# --- artefacts ---


@examples(50)
@given(
    st.dictionaries(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), st.sampled_from(DTYPES), max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_what_is_saved_reloads_bit_equal(tmp_path_factory, names, shape, seed):
    path, rng = tmp_path_factory.getbasetemp() / "reload.safetensors", np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, dtype in names.items()}
    save_artifact(path, "thing", "f", arrays, seed=seed, config={"ratio": 0.1})
    loaded, header = load_artifact(path, "thing", "f")
    assert exact(loaded) == exact(arrays)
    assert (header["kind"], header["fingerprint"], header["seed"], header["config"]) == ("thing", "f", seed, {"ratio": 0.1})


def test_a_single_number_stays_one(tmp_path):
    save_artifact(tmp_path / "a", "thing", "f", {"mean": np.array(2.5)})
    assert exact(load_artifact(tmp_path / "a", "thing")[0]) == exact({"mean": np.array(2.5)})


def test_any_memory_order_is_saved(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    save_artifact(tmp_path / "a", "thing", "f", {"turned": array.T, "strided": array[:, ::2]})
    loaded, _ = load_artifact(tmp_path / "a", "thing")
    np.testing.assert_array_equal(loaded["turned"], array.T)
    np.testing.assert_array_equal(loaded["strided"], array[:, ::2])


def test_the_same_content_gives_the_same_bytes(tmp_path):
    first = saved(tmp_path).read_bytes()
    save_artifact(tmp_path / "b", "thing", "f" * 8, dict(reversed(ARRAYS.items())), seed=3)
    assert (tmp_path / "b").read_bytes() == first


def test_a_header_may_hold_all_that_json_can_say(tmp_path):
    save_artifact(tmp_path / "a", "thing", "f", {}, shape=(1, 2), counts={10: "ten", 9: None}, text="ü\n", sha256="x")
    header = load_artifact(tmp_path / "a", "thing")[1]
    assert (header["shape"], header["counts"], header["text"]) == ([1, 2], {"10": "ten", "9": None}, "ü\n")


@pytest.mark.parametrize(("kind", "fingerprint"), [("other", None), ("thing", "another"), ("thing", ""), ("other", "f" * 8)])
def test_a_wrong_kind_or_partner_is_refused(tmp_path, kind, fingerprint):
    with refuses(DamagedError):
        load_artifact(saved(tmp_path), kind, fingerprint)


def test_another_version_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path)
    monkeypatch.setattr(artifact, "FORMAT_VERSION", 2)
    with refuses(DamagedError):
        load_artifact(path, "thing")


def test_a_missing_file_is_refused(tmp_path):
    for name in ("none", "none/at/all"):
        with refuses(DamagedError):
            load_artifact(tmp_path / name, "thing")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with refuses(DamagedError):
            load_artifact(path, "thing", "f" * 8)
    path.write_bytes(data + b"\0")
    with refuses(DamagedError):
        load_artifact(path, "thing", "f" * 8)


def outcomes_of_flips(path, start, end):
    """What loading gives with some bits of each byte flipped, in turn."""
    data = path.read_bytes()
    for place in range(start, end):
        for bit in (0, 5, 7):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                load_artifact(path, "thing", "f" * 8)
                yield place, "accepted"
            except Exception as error:
                assert "\n" not in str(error)
                yield place, type(error).__name__


def test_a_flipped_bit_among_the_numbers_is_refused(tmp_path):
    path = saved(tmp_path)
    size = path.stat().st_size
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert start < size
    assert {outcome for _, outcome in outcomes_of_flips(path, start, size)} == {"DamagedError"}


def test_a_flipped_bit_in_the_header_is_refused(tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    others = {(data[:place][-9:], outcome) for place, outcome in outcomes_of_flips(path, 0, end)}
    assert not {(before, outcome) for before, outcome in others if outcome != "DamagedError"}


@pytest.mark.parametrize("record", [None, "[]", "null", "3", "{", "{}", "[" * 100_000])
def test_a_file_of_another_program_is_refused(tmp_path, record):
    save_file(ARRAYS, tmp_path / "a", metadata=None if record is None else {"ppf": record})
    with refuses(DamagedError):
        load_artifact(tmp_path / "a", "thing")


@pytest.mark.parametrize(("dtype", "size"), [("BF16", 4), ("F8_E4M3", 2)])
@pytest.mark.parametrize("record", ['{"kind": "thing", "version": 1}', "{}"])
def test_numbers_that_numpy_lacks_are_refused(tmp_path, dtype, size, record):
    header = {"__metadata__": {"ppf": record}, "a": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with refuses(DamagedError):
        load_artifact(tmp_path / "a", "thing")


def test_a_folder_in_the_place_of_a_file_is_said(tmp_path):
    for action in (lambda: load_artifact(tmp_path, "thing"), lambda: read_json(tmp_path), lambda: write_bytes(tmp_path, b"")):
        with refuses(ResourceError):
            action()


# --- single files ---


def test_json_reloads(tmp_path):
    record = {"a": [1, 2.5, None, "ü\n"], "b": {}}
    write_json(tmp_path / "a.json", record)
    assert read_json(tmp_path / "a.json") == record


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000])
def test_what_is_not_json_is_refused(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with refuses(DamagedError):
        read_json(tmp_path / "a.json")


def test_missing_json_is_refused(tmp_path):
    with refuses(DamagedError):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["replace", "fsync", "chmod"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    write_bytes(tmp_path / "a", b"old")
    monkeypatch.setattr(os, name, full_disk)
    with refuses(ResourceError):
        write_bytes(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"old" and names_in(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["replace", "fsync", "chmod"])
def test_a_write_that_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    write_bytes(tmp_path / "a", b"old")
    monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"old" and names_in(tmp_path) == ["a"]


def test_a_write_replaces_and_leaves_nothing_else(tmp_path):
    for data in (b"old", b"", b"new" * 10_000):
        write_bytes(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == data and names_in(tmp_path) == ["a"]


@pytest.mark.parametrize("place", ["none/a", "file/a"])
def test_a_place_that_is_no_folder_is_said(tmp_path, place):
    (tmp_path / "file").touch()
    with refuses(ResourceError):
        write_bytes(tmp_path / place, b"")
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1b[2Kb", "a\0b"])
def test_a_message_about_an_odd_name_is_one_line(tmp_path, name):
    for action in (lambda: load_artifact(tmp_path / name, "thing"), lambda: read_json(tmp_path / name)):
        with refuses(DamagedError) as caught:
            action()
        assert str(caught.value).isprintable()


def test_a_message_about_a_place_of_an_odd_name_is_one_line(tmp_path):
    (tmp_path / "a\nb").mkdir()
    with refuses(ResourceError):
        write_bytes(tmp_path / "a\nb", b"")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    write_bytes(tmp_path / "a", b"")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "b").touch(mode=0o600)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("a", "folder", "folder/inner/b")}
    assert modes == {"a": mode, "folder": 0o777 & ~mask, "folder/inner/b": mode}
    assert umask(mask) == mask


def test_names_are_data(tmp_path):
    for name in ("a b", "ü", "%s{}", "-x"):
        write_json(tmp_path / name, {"name": name})
        assert json.loads((tmp_path / name).read_text()) == {"name": name}
