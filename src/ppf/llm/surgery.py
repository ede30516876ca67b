"""cut(): a new, really smaller model without the removed units; the original stays as it is."""

import copy
import re
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ppf.llm.architectures import family_of, has_plain_ffn, linear
from ppf.llm.auto import register
from ppf.llm.compensation import Fill, filled_bias, means_per_site
from ppf.llm.experts import routers
from ppf.llm.pruned_model import PRUNED
from ppf.llm.ridge import RidgeWeights
from ppf.space.allocation import Allocation
from ppf.space.layout import Layout, Site
from ppf.space.mask import Mask, check_mask

_PER_LAYER = ("layer_types", "no_rope_layers")
"""Fields of any family's config that hold one entry a layer."""
_SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")


def cut(
    model: PreTrainedModel, layout: Layout, mask: Mask, fill: Fill | None = None, fitted: RidgeWeights | None = None
) -> PreTrainedModel:
    """Builds the smaller model.

    Args:
        model: The dense model; untouched, no weight is shared with the result.
        layout: Its layout.
        mask: Which units stay.
        fill: What removed units fed into their readers on average; it becomes a bias of every reader. None adds no bias.
        fitted: New weights of the readers' kept columns; None leaves them as they were.

    Returns:
        A causal LM of the family's per-layer class, on the same device and in the same dtype, in evaluation mode.

    Raises:
        InputError: A mask of another model, or one that leaves a site less than it needs.
        DamagedError: A fill or new weights of another model.
    """
    check_mask(mask, layout)
    means = means_per_site(fill, layout)
    if fitted is not None:
        fitted.check(model, layout, mask)
    smaller = smaller_skeleton(model, layout, mask.allocation, model.dtype, reader_bias=fill is not None)
    source = model.state_dict()
    for site, bits, mean in zip(layout.sites, mask.bits, means, strict=True):
        cut_site(model, source, site, torch.from_numpy(bits.copy()), mean)
    for site, weight in zip(layout.sites, fitted.weights if fitted else (None,) * len(layout.sites), strict=True):
        if weight is not None:
            source[f"{site.reader}.weight"] = weight.to(source[f"{site.reader}.weight"])
    origins = Origins(layout, mask.allocation)
    for name, ids in origins.rows.items():
        source[name] = source[name][ids.to(model.device)]
    fill_buffers(smaller, model.device)
    state = {name: source[origins.of(name)].clone() for name in smaller.state_dict()}
    smaller.load_state_dict(state, strict=True, assign=True)
    smaller.tie_weights()
    return smaller.eval()


def smaller_skeleton(
    model: PreTrainedModel, layout: Layout, allocation: Allocation, dtype: torch.dtype, reader_bias: bool = False
) -> PreTrainedModel:
    """The smaller model on the meta device: its classes, its config and the shapes of its tensors, no weight.

    Args:
        model: The dense model; its own skeleton is enough.
        layout: Its layout.
        allocation: Int[S] kept units.
        dtype: Of the weights.
        reader_bias: As in ``pruned_config``.
    """
    register()  # so that the result's config is known to the auto classes too
    config = pruned_config(model.config, layout, allocation, reader_bias)
    with torch.device("meta"):
        smaller = PRUNED[layout.model_type][2]._from_config(config, dtype=dtype)
    smaller.generation_config = savable_generation_config(model)
    return smaller.eval()


def pruned_config(config: PreTrainedConfig, layout: Layout, allocation: Allocation, reader_bias: bool = False) -> PreTrainedConfig:
    """The config of the smaller model: the dense one's, with `per_layer_config`, plain lists beside it, and `auto_map`.

    Args:
        config: Of the dense model.
        layout: Its layout.
        allocation: Int[S] kept units.
        reader_bias: Every reader gets a bias; a model that has them already keeps them.
    """
    config_class, model_class, lm_class = PRUNED[family_of(config)]
    stays = layout.kept_layers(allocation.kept)
    layers = _widths(config, layout, allocation, stays)
    record = config.to_dict()
    for field in ("per_layer_config", "model_type", "architectures", "auto_map", "transformers_version", "ppf_layers"):
        record.pop(field, None)
    record["num_hidden_layers"] = len(stays)
    for field in _PER_LAYER:
        if record.get(field):
            record[field] = [record[field][layer] for layer in stays]
    record["head_dim"] = getattr(config, "head_dim", None) or record["hidden_size"] // record["num_attention_heads"]
    record |= _mixture(config, record, layers, stays)
    pruned = config_class(**record, per_layer_config=layers)
    fields = dict.fromkeys(field for layer in layers for field in layers[layer])
    pruned.ppf_layers = {field: [layers[layer].get(field) for layer in layers] for field in fields}
    pruned.ppf_dense_params = getattr(config, "ppf_dense_params", None) or layout.total
    if reader_bias:
        pruned.reader_bias = True
    pruned.architectures = [lm_class.__name__]
    pruned.auto_map = {
        "AutoConfig": f"modeling_ppf.{config_class.__name__}",
        "AutoModel": f"modeling_ppf.{model_class.__name__}",
        "AutoModelForCausalLM": f"modeling_ppf.{lm_class.__name__}",
    }
    pruned._attn_implementation = config._attn_implementation
    return pruned


def _mixture(
    config: PreTrainedConfig, record: dict[str, Any], layers: dict[int, dict[str, Any]], stays: list[int]
) -> dict[str, Any]:
    """What the config of a mixture says of all layers; nothing of other models."""
    said: dict[str, Any] = {}
    if "mlp_only_layers" in record:  # of each layer by name: every second one may be another now
        said["mlp_only_layers"] = [new for new, layer in enumerate(stays) if has_plain_ffn(config, layer)]
        said["decoder_sparse_step"] = 1
    if any("expert_sizes" in fields for fields in layers.values()):
        said["expert_sizes"] = []  # of layers without experts: transformers asks for a value of every field
        most = max(1, *(len(fields.get("expert_sizes", ())) for fields in layers.values()))
        said |= {field: most for field in ("num_experts", "num_local_experts") if field in record}
    return said


def _widths(config: PreTrainedConfig, layout: Layout, allocation: Allocation, stays: list[int]) -> dict[int, dict[str, Any]]:
    """By new index of a layer what ``per_layer_config`` says of it: its widths, 0 for a sub-layer that is gone."""
    layers: dict[int, dict[str, Any]] = {layer: {} for layer in stays}
    for site, kept in zip(layout.sites, allocation.kept, strict=True):
        for field, per_unit in site.shapes if site.layer in layers else ():
            if site.role == "expert":
                sizes = layers[site.layer].setdefault(field, [])
                sizes += [per_unit * int(kept)] if kept else []
            else:
                layers[site.layer][field] = per_unit * int(kept)
    for layer, own in layers.items():
        before = config.per_layer_config[layer]
        own.update({field: 0 for field in config.per_layer_attributes or () if getattr(before, field, None) == 0})  # gone already
        if getattr(before, "expert_sizes", None) == [] and not has_plain_ffn(config, layer):
            own["expert_sizes"] = []
        if own.get("expert_sizes") == [] and "shared_expert_intermediate_size" not in own:
            own["intermediate_size"] = 0
    return dict(enumerate(layers.values()))


class Origins:
    """Where the tensors of the smaller model lie in the dense one, which counts layers and experts with those that went.

    Args:
        layout: Of the dense model.
        allocation: Int[S] kept units.

    Attributes:
        rows: By name of the weight of a router that loses experts, Int[K], the rows that stay.
    """

    def __init__(self, layout: Layout, allocation: Allocation) -> None:
        self._layers = layout.kept_layers(allocation.kept)
        self._experts = routers(zip(layout.sites, map(int, allocation.kept), strict=True))
        self.rows = {f"{path}.weight": torch.tensor(stays, dtype=torch.long) for path, stays in self._experts.items()}

    def of(self, name: str) -> str:
        """The dense model's name of a tensor of the smaller one."""
        name = re.sub(r"(?<=\.layers\.)\d+", lambda found: str(self._layers[int(found[0])]), name, count=1)
        block, _, expert = name.partition(".experts.")
        if (stays := self._experts.get(f"{block}.gate")) is None or not expert:
            return name
        number, _, rest = expert.partition(".")
        return f"{block}.experts.{stays[int(number)]}.{rest}"


def cut_site(
    model: PreTrainedModel, state: dict[str, torch.Tensor], site: Site, bits: torch.Tensor, mean: torch.Tensor | None
) -> None:
    """Drops rows of the writers and columns of the reader in ``state``; the model itself is not changed.

    Args:
        model: The dense model.
        state: Its tensors by name; those of this site are replaced.
        site: Where to cut.
        bits: Bool[U], the units that stay.
        mean: Float[U * columns] mean inputs, of which the dropped ones become a bias of the reader; None adds no bias.

    Raises:
        UnsupportedError: A layer that is not plain, such as one of an elastic model, whose units have changed places.
    """
    for name in {site.reader, *(rows.module for rows in site.writers)}:
        linear(model, name)
    if mean is not None:
        state[f"{site.reader}.bias"] = filled_bias(linear(model, site.reader), ~bits.repeat_interleave(site.columns), mean)
    for name, (dim, ids) in slices_of(site, bits).items():
        if name in state:
            state[name] = state[name].index_select(dim, ids.to(model.device))


def slices_of(site: Site, bits: torch.Tensor) -> dict[str, tuple[int, torch.Tensor]]:
    """What of each tensor of a site stays: the dimension that is cut, and the ids that are kept along it, in order.

    Args:
        site: Where to cut.
        bits: Bool[U], the units that stay.

    Returns:
        By name; a layer may be without some of the biases.
    """
    keep = torch.nonzero(bits).squeeze(1)
    spans: dict[str, list[torch.Tensor]] = {}
    for rows in (*site.writers, *site.norms):
        spans.setdefault(rows.module, []).append(rows.offset + _span(keep, rows.width))
    slices = {f"{module}.{part}": (0, torch.cat(ids)) for module, ids in spans.items() for part in ("weight", "bias")}
    return {**slices, f"{site.reader}.weight": (1, _span(keep, site.columns))}


def _span(units: torch.Tensor, width: int) -> torch.Tensor:
    """Element ids of units of ``width`` elements; Int[K] -> Int[K * width]."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def fill_buffers(smaller: PreTrainedModel, device: torch.device) -> None:
    """Computes what lies in no state dict, such as rotary frequencies: exact even if the dense model was cast as a whole."""
    for module in smaller.modules():
        absent = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in absent.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if absent:
            smaller._init_weights(module)


def savable_generation_config(model: PreTrainedModel) -> GenerationConfig:
    """A copy of a model's that can be saved: transformers reads sampling values beside greedy search, but refuses to write them."""
    config = copy.deepcopy(model.generation_config)
    if not config.do_sample:
        config.update(**dict.fromkeys(_SAMPLING))
    return config
