import shutil

import pytest

import tiny_models as tiny
from ppf.llm import gguf_check


@pytest.fixture(autouse=True)
def llama_cpp_only_where_it_is_tested(request, monkeypatch):
    """Whatever is installed, a test does without llama.cpp unless it is marked."""
    if "llamacpp" not in request.keywords:
        monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A whole model folder; not to be changed."""
    return tiny.save(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"
