from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models as tiny
from builders import names_in, random_mask, refuses
from ppf.errors import DamagedError, InputError
from ppf.llm import streamed
from ppf.llm.depth import with_depth
from ppf.llm.export import export
from ppf.llm.load import load_model, open_checkpoint, stored_digest
from ppf.llm.streamed import export_streamed
from ppf.llm.surgery import cut

PLAN = {"ratio": 0.3, "note": "ü"}


def dense(folder, name, dtype=torch.float32, **options):
    """A dense folder, its weights in files of any size."""
    tiny.save(folder, name)
    if dtype != torch.float32 or options:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, **options)
    return open_checkpoint(str(folder))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.TINY)
def test_the_folder_is_that_of_the_cut_model_to_the_byte(tmp_path, name, dtype):
    source = dense(tmp_path / "dense", name, dtype)
    mask, loaded = random_mask(source.layout, 3), load_model(str(tmp_path / "dense"))
    size = export(cut(loaded.model, loaded.layout, mask), loaded.tokenizer, PLAN, tmp_path / "one")
    assert export_streamed(source, mask, PLAN, tmp_path / "two") == size
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert stored_digest(source) == loaded.digest


@pytest.mark.parametrize("case", tiny.MASKS)
def test_every_kind_of_mask_from_many_shards(tmp_path, case, monkeypatch):
    source = dense(tmp_path / "dense", "llama-gqa-tied", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    loaded, mask = load_model(str(tmp_path / "dense")), tiny.MASKS[case](source.layout)
    export(cut(loaded.model, loaded.layout, mask), loaded.tokenizer, PLAN, tmp_path / "one")
    export_streamed(source, mask, PLAN, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


GONE = {
    **{(name, case): mask for name in ("llama-biases", "gemma2-gqa", "olmo2-gqa", "gpt_neox-parallel", "opt-mha")
       for case, mask in tiny.DEPTH_MASKS.items()},
    **{(name, case): mask for name in ("mixtral-gqa", "qwen2_moe-shared", "qwen3_moe-sparse-tied")
       for case, mask in tiny.EXPERT_MASKS.items()},
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), GONE)
def test_sublayers_and_experts_that_are_gone_are_not_written(tmp_path, name, case):
    source, loaded = dense(tmp_path / "dense", name), load_model(str(tmp_path / "dense"))
    layout = with_depth(loaded.model, loaded.layout)
    mask = GONE[name, case](layout)
    export(cut(loaded.model, layout, mask), loaded.tokenizer, PLAN, tmp_path / "one")
    export_streamed(replace(source, layout=with_depth(source.shell, source.layout)), mask, PLAN, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("experts", [False, True])
def test_an_exported_model_is_cut_again(tmp_path, experts):
    first = dense(tmp_path / "dense", "qwen2_moe-shared")
    if experts:
        first = replace(first, layout=with_depth(first.shell, first.layout))
    export_streamed(first, random_mask(first.layout, 3), PLAN, tmp_path / "once")
    once = open_checkpoint(str(tmp_path / "once"))
    export_streamed(once, random_mask(once.layout, 5), PLAN, tmp_path / "twice")
    loaded = load_model(str(tmp_path / "once"))
    expected = tiny.logits(cut(loaded.model, loaded.layout, random_mask(loaded.layout, 5)), tiny.blocks(2))
    assert torch.equal(tiny.logits(load_model(str(tmp_path / "twice")).model, tiny.blocks(2)), expected)


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    source = dense(tmp_path / "dense", "llama-mha")
    mask = random_mask(source.layout)
    export_streamed(source, mask, PLAN, tmp_path / "one")
    monkeypatch.setattr("ppf.llm.stored._LARGEST_FILE", "20KB")
    export_streamed(open_checkpoint(str(tmp_path / "dense")), mask, PLAN, tmp_path / "many")
    assert "model.safetensors.index.json" in names_in(tmp_path / "many")
    assert max(path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")) < 30_000
    one, many = (load_model(str(tmp_path / name)).model for name in ("one", "many"))
    assert torch.equal(tiny.logits(one, tiny.blocks(2)), tiny.logits(many, tiny.blocks(2)))


# --- what is wrong is found, and nothing is left ---


@pytest.mark.parametrize("name", ["llama-mha", "olmo2-gqa"])
def test_a_tensor_that_is_written_badly_is_found(tmp_path, monkeypatch, name):
    source, write = dense(tmp_path / "dense", name), streamed.write_stored

    def write_badly(folder, shell, tensor):
        names = write(folder, shell, tensor)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-2] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return names

    monkeypatch.setattr(streamed, "write_stored", write_badly)
    with refuses(DamagedError) as caught:
        export_streamed(source, random_mask(source.layout), PLAN, tmp_path / "out")
    assert "differs" in str(caught.value) and names_in(tmp_path) == ["dense"]


@pytest.mark.parametrize("name", ["llama-mha", "gpt_neox-parallel", "phi3-gqa"])
def test_tensors_that_are_cut_at_the_wrong_place_are_found(tmp_path, monkeypatch, name):
    """Written and read back alike, but not what the mask keeps."""
    source, slices_of = dense(tmp_path / "dense", name), streamed.slices_of

    def shifted(site, bits):
        found = slices_of(site, bits)
        return {path: (dim, ids.roll(1) if dim == 1 else ids) for path, (dim, ids) in found.items()}

    monkeypatch.setattr(streamed, "slices_of", shifted)
    with refuses(DamagedError) as caught:
        export_streamed(source, random_mask(source.layout), PLAN, tmp_path / "out")
    assert "masked model" in str(caught.value) and names_in(tmp_path) == ["dense"]


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tiny.save(tmp_path / "dense", "llama-mha")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        model.model.norm.weight[3] = np.nan
    model.save_pretrained(tmp_path / "dense")
    source = open_checkpoint(str(tmp_path / "dense"))
    with refuses(DamagedError):
        export_streamed(source, random_mask(source.layout), PLAN, tmp_path / "out")
    assert names_in(tmp_path) == ["dense"]


def test_what_is_there_is_replaced_only_by_force(tmp_path):
    source = dense(tmp_path / "dense", "llama-mha")
    mask = random_mask(source.layout)
    export_streamed(source, mask, PLAN, tmp_path / "out")
    before = contents(tmp_path / "out")
    with refuses(InputError):
        export_streamed(source, mask, {}, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    export_streamed(source, mask, {}, tmp_path / "out", force=True)
    assert names_in(tmp_path) == ["dense", "out"] and (tmp_path / "out" / "ppf.json").read_text() == "{}\n"
