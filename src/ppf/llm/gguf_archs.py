"""What llama.cpp's architectures can hold, and which of them each family may lie in. A family and an architecture are data.

Read off llama.cpp's ``src/models``. Only deci and openelm take the shapes of each layer from arrays; every other takes those of
layer 0 for all: layers that differ are then padded with zeros to the widest.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """One of llama.cpp's architectures.

    Attributes:
        by_layer: Whether layers may differ in width.
        headless: Whether a layer, but not the first, may be without attention.
        pairs: Whether it turns neighbouring rows of a head, not halves: rows of queries and keys are then reordered.
        divisors: Whether it reads a divisor for each rotary frequency, and with it frequencies of any kind.
        partial: Whether it may turn a part of each head without them.
        biases: Whether attention and FFN may have biases beside those of queries, keys and values.
        biased: Whether every linear layer and norm must have one.
        fused: Whether queries, keys and values are one matrix.
        whole: Whether the queries must be as wide as the stream.
        across: Whether queries and keys are normed over all heads at once.
        head: Where the output head is: ``"any"``, ``"tied"`` to the embedding, or ``"own"`` even if it is the same.
        plain_every: Each layer whose number this divides has no rotary embedding; 0 where all have.
        windows: Whether some layers may see a window of the text only.
        gelu: Whether its activation is GELU, not SiLU.
    """

    by_layer: bool = False
    headless: bool = False
    pairs: bool = False
    divisors: bool = False
    partial: bool = False
    biases: bool = False
    biased: bool = False
    fused: bool = False
    whole: bool = False
    across: bool = False
    head: str = "any"
    plain_every: int = 0
    windows: bool = False
    gelu: bool = False


ARCHS = {
    "deci": Arch(by_layer=True, headless=True, pairs=True, divisors=True, biases=True),
    "gemma2": Arch(head="tied", windows=True, gelu=True),
    "gemma3": Arch(windows=True, gelu=True),
    "gptneox": Arch(partial=True, biases=True, biased=True, fused=True, whole=True, head="own", gelu=True),
    "llama": Arch(pairs=True, divisors=True, biases=True),
    "olmo2": Arch(whole=True, across=True, head="own"),
    "openelm": Arch(by_layer=True, fused=True, head="tied"),
    "qwen2": Arch(whole=True),
    "qwen2moe": Arch(whole=True, head="own"),
    "qwen3": Arch(),
    "qwen3moe": Arch(),
    "smollm3": Arch(pairs=True, plain_every=4),
}

ARCHITECTURES = {
    "gemma2": ("gemma2", "gemma2"),
    "gemma3_text": ("gemma3", "gemma3"),
    "gpt_neox": ("gptneox", "gptneox"),
    "granite": ("llama", "deci"),
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "mixtral": ("llama", "llama"),
    "olmo2": ("olmo2", "olmo2"),
    "phi3": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "qwen2_moe": ("qwen2moe", "qwen2moe"),
    "qwen3": ("qwen3", "openelm"),
    "qwen3_moe": ("qwen3moe", "qwen3moe"),
    "smollm3": ("smollm3", "smollm3"),
}
"""By family, llama.cpp's architectures for layers that are alike and for layers that differ; the same one: these are padded."""

SILU, GELU = ("silu",), ("gelu_pytorch_tanh", "gelu", "gelu_fast", "gelu_new")
"""What a model's activation may be called. GELU is one in llama.cpp, read off a table of float16."""

REQUIRED = {
    "gemma3_text": {"use_bidirectional_attention": False},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""Fields of config.json that its architectures take for granted."""
