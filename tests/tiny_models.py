"""Random models of every family, small enough to test with in milliseconds, a tokenizer for them, and masks to cut them by."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from builders import importance, random_mask
from ppf.llm.experts import separate_experts
from ppf.space.allocation import Allocation, allocate
from ppf.space.budget import Budget
from ppf.space.layout import Layout, Rows, Site
from ppf.space.mask import Mask, select
from ppf.space.policy import Policy

torch.set_num_threads(1)  # sums come out alike in every process

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

OPT = {**SIZES, "ffn_dim": 40, "pad_token_id": 1, "activation_function": "gelu"}  # with relu, some channels would never fire

MOE = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}

TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-mha": lambda: LlamaConfig(**SIZES, num_key_value_heads=4),
    "llama-gqa-tied": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama-wide-heads-rope": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3_ROPE),
    "mistral-gqa": lambda: MistralConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=None),
    "mistral-mha-tied-window": lambda: MistralConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=True, sliding_window=6),
    "qwen2-gqa": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen2-mha-tied-window": lambda: Qwen2Config(
        **SIZES, num_key_value_heads=4, tie_word_embeddings=True, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3-gqa": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "qwen3-mha-tied": lambda: Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=4, tie_word_embeddings=True),
    "qwen3-biases": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, attention_bias=True),
    "phi3-gqa": lambda: Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "phi3-mha-partial-window": lambda: Phi3Config(
        **SIZES, num_key_value_heads=4, pad_token_id=0, sliding_window=6, partial_rotary_factor=0.5, tie_word_embeddings=True
    ),
    "gemma2-gqa": lambda: Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=6, rms_norm_eps=1e-3
    ),
    "gemma3_text-gqa": lambda: Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=6, sliding_window_pattern=2
    ),
    "gpt_neox-parallel": lambda: GPTNeoXConfig(**SIZES, rotary_pct=0.5),
    "gpt_neox-serial-tied": lambda: GPTNeoXConfig(
        **SIZES, rotary_pct=1.0, use_parallel_residual=False, tie_word_embeddings=True, attention_bias=False
    ),
    "opt-mha": lambda: OPTConfig(**OPT),
    "opt-projected-norms-behind": lambda: OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=24),
    "olmo2-gqa": lambda: Olmo2Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "granite-gqa-biases": lambda: GraniteConfig(
        **SIZES,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=2.0,
        logits_scaling=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "mixtral-gqa": lambda: MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    "qwen2_moe-shared": lambda: Qwen2MoeConfig(
        **SIZES, **MOE, num_key_value_heads=2, shared_expert_intermediate_size=24, mlp_only_layers=[1]
    ),
    "qwen3_moe-sparse-tied": lambda: Qwen3MoeConfig(
        **SIZES, **MOE, num_key_value_heads=2, head_dim=16, decoder_sparse_step=2, norm_topk_prob=True, tie_word_embeddings=True
    ),
    "qwen2_moe-experts-everywhere": lambda: Qwen2MoeConfig(
        **SIZES, **MOE, num_key_value_heads=2, shared_expert_intermediate_size=24, tie_word_embeddings=True
    ),
    "qwen3_moe-experts-everywhere": lambda: Qwen3MoeConfig(**SIZES, **MOE, num_key_value_heads=2, head_dim=16, norm_topk_prob=True),
    "smollm3-fourth-layer-plain": lambda: SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 5}, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True
    ),
    "smollm3-gqa-window": lambda: SmolLM3Config(
        **SIZES, num_key_value_heads=2, pad_token_id=0, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=6
    ),
}


def _uniform(layout: Layout) -> Mask:
    return select(allocate(Policy.uniform(layout), Budget.from_ratio(0.3, layout), layout), importance(layout, 1), layout)


def _only(kind: str) -> Callable[[Layout], Mask]:
    def mask(layout: Layout) -> Mask:
        kept = [site.units // 2 if site.kind == kind else site.units for site in layout.sites]
        return select(Allocation(np.array(kept)), importance(layout, 2), layout)

    return mask


MASKS: dict[str, Callable[[Layout], Mask]] = {
    "nothing": lambda layout: Mask(tuple(np.ones(units, dtype=bool) for units in layout.units)),
    "uniform": _uniform,
    "random": lambda layout: random_mask(layout, 3),
    "floors": lambda layout: select(Allocation(layout.floors), importance(layout, 4), layout),
    "only ffn": _only("ffn"),
    "only attn": _only("attn"),
}


def _without(gone: Callable[[Site], bool]) -> Callable[[Layout], Mask]:
    def mask(layout: Layout) -> Mask:
        kept = [site.floor if gone(site) else -(-2 * site.units // 3) for site in layout.sites]
        return select(Allocation(np.array(kept)), importance(layout, 5), layout)

    return mask


DEPTH_MASKS: dict[str, Callable[[Layout], Mask]] = {
    "attention": _without(lambda site: site.layer == 1 and site.role == "attn"),
    "ffn": _without(lambda site: site.layer == 1 and site.role == "ffn"),
    "layer": _without(lambda site: site.layer == 1),
    "first": _without(lambda site: site.layer == 0),
    "last": _without(lambda site: site.layer == 2),
    "all": _without(lambda site: True),
}
"""For layouts of depth: sub-layers and layers that go as a whole, everything else in part."""
EXPERT_MASKS: dict[str, Callable[[Layout], Mask]] = {
    "one": _without(lambda site: site.kind == "expert2"),
    "differing": _without(lambda site: site.role == "expert" and int(site.kind.removeprefix("expert")) <= site.layer),
    "one left": _without(lambda site: site.role == "expert" and site.kind != "expert1"),
    "none left": _without(lambda site: site.role == "expert" and site.layer > 0),
    "no layer": _without(lambda site: site.layer > 0),
}
"""The same for mixtures, whose tokens are sent to two of four experts: experts that go."""
MIXTURES = [name for name in TINY if "moe" in name or "mixtral" in name]
NO_DEPTH = ("opt-projected-norms-behind",)
"""Whose stream passes through the norms of its sub-layers."""

LLAMA_LIKE = [name for name in TINY if name.split("-")[0] in ("llama", "mistral", "qwen2", "qwen3")]
SOME = [*LLAMA_LIKE, "phi3-gqa", "gemma2-gqa", "opt-mha", "olmo2-gqa", "mixtral-gqa"]
"""Those and one of each other kind of code, for what takes long."""
CONTRACT = [
    (name, case)
    for name in TINY
    for case in MASKS
    if name in LLAMA_LIKE or case == "random" or (name in SOME and case in ("nothing", "floors"))
]
"""What the contract of every family runs through: all masks where the most is shared, fewer elsewhere."""


def model(name: str = "llama-gqa-tied", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of ``TINY`` as ``load_model`` gives it, in which every parameter, biases and norms too, is random and matters."""
    return separate_experts(stored(name, seed, dtype))


def stored(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same as transformers has it."""
    tiny = AutoModelForCausalLM.from_config(TINY[name](), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tiny.parameters():
            base = parameter if parameter.dim() == 1 else 0  # norms stay around one, biases around zero
            parameter.copy_(base + 0.15 * torch.randn(parameter.shape, generator=generator))
    return tiny.eval()


def tokenizer(words: int = VOCAB - 3) -> PreTrainedTokenizerBase:
    """One token a word; the words are w3, w4 and so on, each with its number as its id."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, words + 3)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def blocks(count: int = 4, length: int = 12, seed: int = 0) -> np.ndarray:
    """Int[count, length] random tokens."""
    return np.random.default_rng(seed).integers(3, VOCAB, (count, length))


def save(to: Path, name: str = "llama-gqa-tied", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a tiny model and its tokenizer, as the hub would have it."""
    stored(name, seed, dtype).save_pretrained(to)
    tokenizer().save_pretrained(to)
    return to


def snapshot(of: PreTrainedModel) -> dict[str, object]:
    """Everything of a model that must not change, in a form to compare."""
    tensors = {**dict(of.named_parameters()), **dict(of.named_buffers())}
    state = {
        name: (tensor.dtype, tensor.requires_grad, tensor.detach().clone().reshape(-1).view(torch.uint8))
        for name, tensor in tensors.items()
    }
    hooks = [name for name, module in of.named_modules() if module._forward_pre_hooks or module._forward_hooks]
    return {
        "state": {name: (dtype, grad, raw.numpy().tobytes()) for name, (dtype, grad, raw) in state.items()},
        "gradients": [name for name, parameter in of.named_parameters() if parameter.grad is not None],
        "hooks": hooks,
        "config": of.config.to_dict(),
        "generation": of.generation_config.to_dict(),
        "training": [module.training for module in of.modules()],
    }


def owned(rows: Rows, bits: np.ndarray) -> np.ndarray:
    """Int[K * width]: the rows of a module that the units with a True bit own."""
    return (rows.offset + np.flatnonzero(bits)[:, None] * rows.width + np.arange(rows.width)).ravel()


def owned_by_module(site: Site, bits: np.ndarray) -> dict[str, np.ndarray]:
    """``owned`` of all writers of a site and its norms, by module, in the order in which surgery keeps them."""
    found: dict[str, list[np.ndarray]] = {}
    for rows in (*site.writers, *site.norms):
        found.setdefault(rows.module, []).append(owned(rows, bits))
    return {module: np.concatenate(ids) for module, ids in found.items()}


def is_mixture(name: str) -> bool:
    """Whether a tiny model has experts."""
    return name.split("-")[0] in ("mixtral", "qwen2_moe", "qwen3_moe")


def same(one: torch.Tensor, other: torch.Tensor, name: str) -> bool:
    """Whether two answers agree bit for bit; where experts see few tokens, their rounding depends on where weights lie."""
    return torch.allclose(one, other, rtol=0, atol=2e-6) if is_mixture(name) else torch.equal(one, other)


@torch.inference_mode()
def logits(of: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """Float[B, L, V] without a cache."""
    return of(input_ids=torch.from_numpy(ids), use_cache=False).logits
