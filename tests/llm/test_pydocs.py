import subprocess
import sys
from pathlib import Path

from ppf.llm import pydocs


def test_buckets_have_no_document_in_common():
    buckets = [pydocs.documents(bucket) for bucket in range(3)]
    for bucket in buckets:
        assert len(bucket) == len(set(bucket)) > 5 and all(text.strip() for text in bucket)
        assert sum(map(len, bucket)) > 30_000
    assert len(set.union(*map(set, buckets))) == sum(map(len, buckets))


def test_the_bucket_of_a_name_never_changes():
    """The embedded model was trained on buckets 3 to 9; a name that moved would leak into its test text."""
    names = ["topic:if", "topic:lambda", "module:json", "module:asyncio", "module:os"]
    assert [pydocs.bucket_of(name) for name in names] == [6, 2, 5, 6, 7]
    found = [sum(pydocs.bucket_of(f"module:{index}") == bucket for index in range(5000)) for bucket in range(10)]
    assert min(found) > 400 and max(found) < 600


def test_another_process_reads_the_same():
    code = "import hashlib; from ppf.llm import pydocs; print(hashlib.sha256(repr(pydocs.documents(1)).encode()).hexdigest())"
    source = str(Path(pydocs.__file__).parents[2])
    seeds = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": source, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        for seed in ("1", "2")
    ]
    assert seeds[0].stdout == seeds[1].stdout and len(seeds[0].stdout.strip()) == 64, seeds[0].stderr


def test_only_docstrings_of_some_length_are_taken(tmp_path):
    long = "A docstring that says a good deal about what it stands for, and so is longer than eighty."
    (tmp_path / "a.py").write_text(
        f'"""Short."""\n\nclass A:\n    """{long}"""\n\n    async def f(self):\n        """{long[::-1]}"""\n'
    )
    assert list(pydocs._docstrings(tmp_path / "a.py")) == [long, long[::-1]]
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "latin.py").write_bytes(b"# \xff")
    assert [list(pydocs._docstrings(tmp_path / name)) for name in ("broken.py", "latin.py")] == [[], []]


def test_packages_are_read_in_order_without_their_tests(tmp_path):
    for name in ("b.py", "a.py", "sub/c.py", "test/d.py", "tests/e.py", "sub/test/f.py", "__pycache__/g.py", "data.txt"):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).touch()
    (tmp_path / "single.py").touch()
    found = [str(path.relative_to(tmp_path)) for path in pydocs._sources(tmp_path, "package")]
    assert found == ["package/a.py", "package/b.py", "package/sub/c.py"]
    assert pydocs._sources(tmp_path, "single") == [tmp_path / "single.py"] and pydocs._sources(tmp_path, "none") == []
