import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ppf

SOURCE = Path(ppf.__file__).parent
FLOORS = {
    "errors": 0, "artifact": 0, "_hook": 0, "space": 1, "samples": 1, "config": 1, "progress": 1, "llm": 2, "learn": 2, "decide": 3,
    "study": 2, "recipes": 4, "cli": 5, "__init__": 5, "__main__": 5,
}  # fmt: skip
HEAVY = ("torch", "transformers", "scipy", "gymnasium", "huggingface_hub")


def modules():
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}


def imports(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_only_go_down(name):
    unit = name.split(".")[0]
    for imported in imports(modules()[name]):
        root, *rest = imported.split(".")
        if root == "ppf" and rest and rest[0] in FLOORS and rest[0] != unit:
            assert FLOORS[rest[0]] <= FLOORS[unit], f"{name} imports {imported}"
            assert {unit, rest[0]} != {"llm", "learn"}, f"{name} imports {imported}"
        if unit in ("space", "samples", "artifact", "errors", "config", "decide", "study"):
            assert root not in HEAVY, f"{name} imports {imported}"
        if unit == "learn":
            assert root != "transformers", f"{name} imports {imported}"


def test_there_is_no_import_cycle():
    graph = {}
    for name, path in modules().items():
        short = name.removesuffix(".__init__")
        found = {imported.removeprefix("ppf.") for imported in imports(path) if imported.startswith("ppf.")}
        graph[short] = {module for module in found if module in modules() and module != short}
    done: set[str] = set()

    def walk(module, above):
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for below in graph.get(module, ()):
                walk(below, [*above, module])
            done.add(module)

    for module in graph:
        walk(module, [])


def test_files_stay_readable():
    for name, path in modules().items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, name


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_ppf_is_light():
    result = run(f"import ppf, sys; print([name for name in {HEAVY + ('numpy', 'rich', 'tyro')} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_public_names_are_there_and_documented():
    assert set(ppf.__all__) <= set(dir(ppf))
    for name in ppf.__all__:
        value = getattr(ppf, name)
        assert isinstance(value, str) or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ppf.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["import ppf", "from transformers import AutoModelForCausalLM\nimport ppf"])
def test_importing_ppf_is_enough_for_the_auto_classes(first):
    code = "\nfrom transformers import AutoConfig\nprint(AutoConfig.for_model('ppf_qwen3').model_type)"
    result = run(first + "\nfrom transformers import AutoModelForCausalLM" + code)
    assert result.stdout.strip() == "ppf_qwen3", result.stderr
