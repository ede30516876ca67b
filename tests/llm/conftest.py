import shutil

import pytest

import tiny_models as tiny


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A whole model folder; not to be changed."""
    return tiny.save(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"
