"""A model family that ppf does not know, from outside of ppf: Arcee, a Llama whose FFN has no gate.

A family is data: which rows and columns belong to a unit, where a sub-layer begins, and the classes of the cut model. The
exported folder loads wherever these lines ran before. CONTRIBUTING.md shows the same family as a change of ppf itself.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import ArceeConfig, ArceeForCausalLM, ArceeModel, AutoModelForCausalLM, PreTrainedConfig

from ppf.llm.architectures import ENTRANCES, FAMILIES, layout_of_model
from ppf.llm.auto import PRUNED, register
from ppf.llm.pruned_model import _PerLayerCausalLM, _PerLayerConfig, _PerLayerModel
from ppf.llm.surgery import cut
from ppf.space.layout import Site
from ppf.space.mask import Mask


class PPFArceeConfig(_PerLayerConfig, ArceeConfig):
    model_type = "ppf_arcee"


class PPFArceeModel(_PerLayerModel, ArceeModel):
    config_class = PPFArceeConfig


class PPFArceeForCausalLM(_PerLayerCausalLM, ArceeForCausalLM):
    config_class, per_layer_model = PPFArceeConfig, PPFArceeModel


def sites(config: PreTrainedConfig) -> Iterator[Site]:
    """Those of a Llama, without the rows of the gate."""
    for site in FAMILIES["llama"](config):
        yield site if site.kind == "attn" else Site(**{**vars(site), "writers": site.writers[1:]})


def add() -> None:
    """Makes the family known in this process."""
    FAMILIES["arcee"], ENTRANCES["arcee"] = sites, ENTRANCES["llama"]
    PRUNED["arcee"] = PPFArceeConfig, PPFArceeModel, PPFArceeForCausalLM
    register()


def main(out: str = "runs/add_a_family") -> float:
    add()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    model = ArceeForCausalLM(ArceeConfig(**shape, num_key_value_heads=2, max_position_embeddings=64)).eval()
    layout = layout_of_model(model)
    mask = Mask(tuple(torch.arange(units).remainder(2).eq(0).numpy() for units in layout.units))  # every second unit stays
    smaller = cut(model, layout, mask)
    smaller.save_pretrained(Path(out))
    again = AutoModelForCausalLM.from_pretrained(Path(out))
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        off = (again(ids).logits - smaller(ids).logits).abs().max().item()
    print(f"{layout.total:,} -> {sum(p.numel() for p in again.parameters()):,} parameters, logits off by {off:g}")
    return off


if __name__ == "__main__":
    main()
