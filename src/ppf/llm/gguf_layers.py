"""The weights of each layer under llama.cpp's names, however the family names and fuses them: read through its sites."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.architectures import FAMILIES, family_of, stack_of
from ppf.space.layout import Site

_PRE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_AROUND = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_POST}
_QUERY_KEY = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
OTHERS = {
    "gemma2": _AROUND,
    "gemma3_text": {**_AROUND, **_QUERY_KEY},
    "mixtral": {**_PRE, **_ROUTER},
    "olmo2": {**_POST, **_QUERY_KEY},
    "qwen2_moe": {**_PRE, **_ROUTER, "ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
    "qwen3": {**_PRE, **_QUERY_KEY},
    "qwen3_moe": {**_PRE, **_QUERY_KEY, **_ROUTER},
}
"""By family, the modules of a layer that lie in no site, by llama.cpp's name; two norms where it is not listed."""
SHIFTED = {"gemma2", "gemma3_text"}
"""Families whose norms keep their weights less one."""
Weights = Callable[[str], torch.Tensor]
"""Gives a tensor of a model by its name."""


class Part(NamedTuple):
    """A linear layer, a block of one, or a norm: weight and bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer.

    Attributes:
        heads: Query heads; 0 where attention is gone, whose parts are then empty.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        ffn: Channels, of each expert if there are several; 0 where the FFN is gone.
        shared: Channels of the expert that all tokens see; 0 if there is none.
        attention: Queries, keys, values and output: ``"attn_q"`` and so on.
        ffns: For the FFN, or each expert: ``"ffn_up"``, ``"ffn_down"`` and, with a gate, ``"ffn_gate"``.
        shared_ffn: The same of that expert; empty if there is none.
        others: Norms and routers by name.
    """

    heads: int
    kv_heads: int
    head_dim: int
    ffn: tuple[int, ...]
    shared: int
    attention: dict[str, Part]
    ffns: tuple[dict[str, Part], ...]
    shared_ffn: dict[str, Part]
    others: dict[str, Part]

    @property
    def mixed(self) -> bool:
        """Whether its FFN is a mixture of experts, be it of one."""
        return "ffn_gate_inp" in self.others


def layers(model: PreTrainedModel, read: Weights | None = None) -> Iterator[Layer]:
    """All decoder layers in order, each read when its turn comes.

    Args:
        model: Dense or pruned; its matrices may be on the meta device.
        read: Gives its tensors; None for its own.

    Raises:
        UnsupportedError: A mixture that has experts in some layers only.
    """
    family = family_of(model.config)
    by_layer: dict[int, list[Site]] = {index: [] for index in range(len(stack_of(model)))}
    for site in FAMILIES[family](model.config):
        by_layer[site.layer].append(site)
    reader = _Reader(model, family, read)
    for index, sites in by_layer.items():
        yield reader.layer(index, sites)


def own_weights(model: PreTrainedModel) -> Weights:
    """The tensors that a model itself holds."""
    return lambda name: model.get_parameter(name).detach()


def ends(model: PreTrainedModel, read: Weights | None = None) -> tuple[torch.Tensor, Part, torch.Tensor]:
    """The embeddings, the norm before the output head, and that head; arguments as in ``layers``."""
    base, reader = model.base_model, _Reader(model, family_of(model.config), read)
    norm = base.norm if hasattr(base, "norm") else base.final_layer_norm
    first, last = (reader.part(module).weight for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    return first, reader.norm(norm), last


class _Reader:
    """Puts together what a model's tensors say."""

    def __init__(self, model: PreTrainedModel, family: str, read: Weights | None) -> None:
        self._model, self._family, self._read = model, family, read or own_weights(model)
        self._names = {id(module): name for name, module in model.named_modules()}

    def layer(self, index: int, sites: list[Site]) -> Layer:
        family = self._family
        attention = [site for site in sites if site.role == "attn"]
        shared = [site for site in sites if site.sees_all]
        ffns = [site for site in sites if site not in attention and site not in shared]
        if "ffn_gate_inp" in OTHERS.get(family, _PRE) and (not ffns or ffns[0].role != "expert"):
            raise UnsupportedError(f"llama.cpp needs experts in all layers; layer {index} has none; use the folder instead")
        module = stack_of(self._model)[index]
        return Layer(
            *_heads(attention[0]),
            tuple(site.units for site in ffns),
            sum(site.units for site in shared),
            self._attention(attention[0]),
            tuple(self._ffn(site) for site in ffns),
            self._ffn(shared[0]) if shared else {},
            {name: self._other(module, path, attention[0]) for name, path in OTHERS.get(family, _PRE).items()},
        )

    def part(self, module: nn.Module) -> Part:
        name = self._names[id(module)]
        bias = getattr(module, "bias", None)
        return Part(self._read(f"{name}.weight"), None if bias is None else self._read(f"{name}.bias"))

    def norm(self, module: nn.Module) -> Part:
        """A norm, or a router, whose one row becomes a vector."""
        weight, bias = self.part(module)
        if weight.ndim == 1 and self._family in SHIFTED:
            weight = weight.float() + 1
        return Part(weight[0] if weight.ndim == 2 and len(weight) == 1 else weight, bias)

    def _attention(self, site: Site) -> dict[str, Part]:
        names = ("attn_q", "attn_k", "attn_v")
        if not site.units:
            return self._empty(names, "attn_output")
        blocks = [self._rows(site, at) for at in range(len(site.writers))]
        if len(blocks) == 1:  # head after head, each with its query, key and value
            [(weight, bias)] = blocks
            third = partial(_third, heads=site.units)
            blocks = [Part(third(weight, at=at), None if bias is None else third(bias, at=at)) for at in range(3)]
        return {**dict(zip(names, blocks, strict=True)), "attn_output": self.part(self._model.get_submodule(site.reader))}

    def _ffn(self, site: Site) -> dict[str, Part]:
        names = ("ffn_gate", "ffn_up") if len(site.writers) == 2 else ("ffn_up",)
        if not site.units:
            return self._empty(names, "ffn_down")
        blocks = (self._rows(site, at) for at in range(len(site.writers)))
        return {**dict(zip(names, blocks, strict=True)), "ffn_down": self.part(self._model.get_submodule(site.reader))}

    def _empty(self, writers: tuple[str, ...], reader: str) -> dict[str, Part]:
        """The parts of a sub-layer that is gone."""
        hidden = self._model.config.hidden_size
        return {**dict.fromkeys(writers, Part(torch.zeros(0, hidden))), reader: Part(torch.zeros(hidden, 0))}

    def _rows(self, site: Site, at: int) -> Part:
        """The rows of all units in one of a site's writers."""
        rows = site.writers[at]
        span = slice(rows.offset, rows.offset + site.units * rows.width)
        weight, bias = self.part(self._model.get_submodule(rows.module))
        return Part(weight[span], None if bias is None else bias[span])

    def _other(self, layer: nn.Module, path: str, attention: Site) -> Part:
        """A norm or a router of a layer; ones where it went with its sub-layer."""
        owner, _, name = path.rpartition(".")
        module = getattr(layer.get_submodule(owner), name, None)
        if module is None:  # of queries and keys: as wide as a head, or as all of them
            return Part(torch.ones(0 if attention.norms else _heads(attention)[2]))
        return Part(torch.ones(self._model.config.hidden_size)) if isinstance(module, nn.Identity) else self.norm(module)


def _heads(site: Site) -> tuple[int, int, int]:
    """Query heads, key heads and the width of a head. A matrix of queries, keys and values head by head has three a unit."""
    head_dim = site.writers[-1].width // (3 if len(site.writers) == 1 else 1)
    return site.units * site.columns // head_dim, site.units, head_dim


def _third(tensor: torch.Tensor, heads: int, at: int) -> torch.Tensor:
    return tensor.reshape(heads, 3, -1, *tensor.shape[1:])[:, at].flatten(0, 1)
