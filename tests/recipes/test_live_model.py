import json

import pytest
import torch

import ppf
import tiny_models as tiny
from builders import copied, refuses
from ppf.errors import DamagedError, InputError


@pytest.fixture(scope="module")
def study(fitted, place):
    """The study, of the model in its folder."""
    return ppf.Study(fitted.folder, place / "model")


def logits(of, ids):
    return of(input_ids=torch.from_numpy(ids)).logits


def test_the_live_model_answers_at_any_ratio_as_the_checkpoint_of_it(study):
    live, ids = study.live(), tiny.blocks(2, 9)
    assert isinstance(live, ppf.ElasticModel)
    torch.testing.assert_close(logits(live, ids), tiny.logits(tiny.model("llama-mha"), ids), rtol=0, atol=1e-5)
    for ratio in (0.5, 0.2):
        view = live.set_ratio(ratio)
        assert view.allocation.kept.tolist() == study.policy(ratio).allocation.kept.tolist()
        torch.testing.assert_close(logits(live, ids), tiny.logits(study.prune(ratio).model, ids), rtol=0, atol=1e-5)


def test_it_starts_at_a_ratio_and_generates(study):
    live = study.live(0.3, nested=True)
    assert live.current.allocation.kept.tolist() == study.policy(0.3, nested=True).allocation.kept.tolist()
    tokens = live.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert tokens.shape[1] <= 6 and tokens[0, :3].tolist() == [5, 6, 7]


def test_a_model_given_as_an_object_is_not_changed_and_can_still_be_pruned(fitted):
    model, ids = tiny.model("llama-mha"), tiny.blocks(2, 9)
    before = tiny.snapshot(model)
    study = ppf.Study(fitted.folder, model, tiny.tokenizer())
    expected = tiny.logits(study.prune(0.4).model, ids)
    live = study.live(0.4)
    torch.testing.assert_close(logits(live, ids), expected, rtol=0, atol=1e-5)
    assert torch.equal(tiny.logits(study.prune(0.4).model, ids), expected)
    assert tiny.snapshot(model) == before


def test_what_cannot_be_decided_is_refused_before_a_model_is_loaded(fitted):
    with refuses(InputError):
        ppf.Study(fitted.folder, "no-such-model").live(0.999)


def test_another_model_is_refused(fitted, tmp_path):
    other = tiny.save(tmp_path / "other", "llama-mha", seed=9)
    with refuses(DamagedError):
        ppf.Study(fitted.folder, other).live()
    folder = copied(fitted, tmp_path / "study", digest="0" * 32)
    assert json.loads((folder / "study.json").read_text())["model"]["digest"] == "0" * 32
    with refuses(DamagedError):
        ppf.Study(folder, tiny.model("llama-mha"), tiny.tokenizer()).live()
