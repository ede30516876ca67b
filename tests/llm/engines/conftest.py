import pytest

import tiny_models as tiny
from builders import random_mask
from ppf.llm.architectures import layout_of_model
from ppf.llm.export import export
from ppf.llm.load import load_model
from ppf.llm.surgery import cut
from ppf.llm.text import Text

BLOCKS = tiny.blocks(6, 12)


@pytest.fixture
def real(tmp_path):
    """A cut model (so that workers must know pruned families by themselves), a text for it, and its layout."""
    model = tiny.model()
    whole = layout_of_model(model)
    export(cut(model, whole, random_mask(whole)), tiny.tokenizer(), {}, tmp_path / "model")
    of = load_model(str(tmp_path / "model")).layout
    Text("a", BLOCKS[:1], BLOCKS, BLOCKS[:0], BLOCKS[:3]).save(tmp_path / "text", of.fingerprint)
    return tmp_path / "model", tmp_path / "text", of
