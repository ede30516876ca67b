"""What is installed: every extra is pinned, and hashed or named as one that is not."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
HASHES = (ROOT / "hashes.txt").read_text()


def plain(name):
    """A package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text):
    return {plain(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def asked_by(extra):
    """Packages that an extra names, those of the extras in it included."""
    for requirement in EXTRAS[extra]:
        name, inner = re.match(r"([\w.-]+)(?:\[(.*?)\])?", requirement).groups()
        if name == "ppf":
            for other in inner.split(","):
                yield from asked_by(other)
        else:
            yield plain(name)


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_is_hashed_or_the_file_says_why_not(extra):
    if f"# Without the extra {extra}: " not in HASHES:
        assert set(asked_by(extra)) <= set(pins(HASHES))


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_is_pinned(extra):
    assert set(asked_by(extra)) <= set(pins((ROOT / "constraints.txt").read_text()))


def test_pins_and_hashes_are_of_the_same_versions():
    hashed, pinned = pins(HASHES), pins((ROOT / "constraints.txt").read_text())
    assert {name: hashed[name] for name in hashed.keys() & pinned} == {name: pinned[name] for name in hashed.keys() & pinned}


def test_every_package_has_one_version_and_a_hash():
    lines = [line for line in HASHES.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert len(pins(HASHES)) == len(lines) > 60 and not {"torch", "ppf"} & set(pins(HASHES))
