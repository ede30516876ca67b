"""Coverage-guided fuzzing of the readers that are written in Python: anything but a refusal of ours ends it.

    python tests/fuzz_atheris.py READER SECONDS

libFuzzer ends with 0 when the time is over, 70 where an input took too long, 71 where it took too much memory, 77 where it broke
the reader, and 72 where somebody else stopped it by SIGINT or SIGTERM, which says nothing of the reader.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ppf.salvage", "ppf.llm.gguf_structure", "ppf.llm.weights", "ppf.space.plan"]):
    from ppf.llm import weights
    from ppf.llm.gguf_structure import check_structure
    from ppf.salvage import salvage
    from ppf.space.plan import is_export, mask_of, read_plan, wish_of

import fuzzing
from ppf.errors import PPFError

PLACE = Path(tempfile.mkdtemp(prefix="ppf-fuzz-"))


def _plan(path: Path) -> object:
    record = read_plan(path)
    return mask_of(record, fuzzing.LAYOUT) if is_export(record) else wish_of(record, fuzzing.LAYOUT)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "salvage": ("sample store", lambda path: salvage([path])),
    "gguf": ("GGUF", check_structure),
    "weights": ("weights", lambda path: list(weights._header(path))),
    "plan": ("plan.json", _plan),
    "ratios": ("ratios.csv", _plan),
}
"""By name: whose file is the seed, and the reader."""


def main(name: str, seconds: str) -> None:
    """Runs one."""
    kind, read = READERS[name]
    seed = fuzzing.targets(PLACE)[kind].path
    corpus, path = PLACE / "corpus", PLACE / f"input{seed.suffix}"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed.read_bytes())

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except PPFError as error:
            assert str(error).isprintable()

    options = [f"-max_total_time={seconds}", "-max_len=65536", "-timeout=60", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
