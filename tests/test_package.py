import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ppf
import tiny_models
from builders import random_mask
from ppf.llm.architectures import layout_of_model
from ppf.llm.export import export
from ppf.llm.pruned_model import PRUNED
from ppf.llm.stand_ins import FAMILIES
from ppf.llm.surgery import cut

SOURCE, ROOT = Path(ppf.__file__).parent, Path(__file__).parent.parent
FLOORS = {
    "errors": 0, "artifact": 0, "lock": 0, "_hook": 0, "provenance": 0, "space": 1, "samples": 1, "salvage": 1,
    "config": 1, "progress": 1,
    "llm": 2, "learn": 2, "study": 2, "fit_command": 2, "decide": 3, "repair": 3, "recipes": 4, "report": 4,
    "cli": 5, "commands": 5, "printing": 5, "server": 5,
    "__init__": 5, "__main__": 5,
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


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "tools"])
def test_files_stay_readable(folder):
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lines and {str(path): count for path, count in lines.items() if count > 350} == {}


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


USES = {
    "AutoConfig.for_model": "AutoConfig.for_model('ppf_qwen3')",
    "AutoConfig.from_pretrained": "AutoConfig.from_pretrained(sys.argv[1])",
    "AutoTokenizer": "AutoTokenizer.from_pretrained(sys.argv[1]) and AutoConfig.from_pretrained(sys.argv[1])",
    "AutoModel": "AutoModel.from_pretrained(sys.argv[1]).config",
    "AutoModelForCausalLM": "AutoModelForCausalLM.from_pretrained(sys.argv[1]).config",
    "from_config": "AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1])).config",
}
OTHERS = "Qwen3ForCausalLM, GenerationConfig, ProcessorMixin, LlavaForConditionalGeneration"
ORDERS = [
    *(("import ppf", use) for use in USES),
    *(("from transformers import AutoConfig\nimport ppf", use) for use in ("AutoConfig.from_pretrained", "AutoModel")),
    *((f"import ppf\nfrom transformers import {OTHERS}", use) for use in ("AutoConfig.for_model", "AutoModelForCausalLM")),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pruned model with its tokenizer."""
    model = tiny_models.model("qwen3-gqa")
    layout = layout_of_model(model)
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(cut(model, layout, random_mask(layout)), tiny_models.tokenizer(), {}, folder)
    return folder


@pytest.mark.parametrize(("first", "use"), ORDERS)
def test_importing_ppf_is_enough_for_the_auto_classes(exported, first, use):
    used = sorted({node.id for node in ast.walk(ast.parse(USES[use])) if getattr(node, "id", "").startswith("Auto")}, reverse=True)
    code = f"import sys\n{first}\nfrom transformers import {', '.join(used)}\nprint(type({USES[use]}))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code, str(exported)], capture_output=True, text=True)
    assert result.stdout == "<class 'ppf.llm.pruned_model.PPFQwen3Config'>\n", result.stderr


def test_there_is_a_stand_in_for_every_pruned_model():
    assert set(FAMILIES) == set(PRUNED)
    assert {config.model_type for config, *_ in PRUNED.values()} == {f"ppf_{family}" for family in PRUNED}
