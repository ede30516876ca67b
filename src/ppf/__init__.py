"""ppf makes a language model smaller, by any ratio, and the result loads in transformers.

    ratio ─► Budget ─► [agent] Policy ─allocate─► Allocation ─select(Importance)─► Mask ─cut─► model ─export─► folder
    fitting only:  Mask ─measure─► Sample ─► SampleStore ─► Predictor ─► Objective(masks)->damage ─► agent training

    import ppf
    study = ppf.fit("ref-a", text="pydocs")
    pruned = study.prune(ratio=0.3)
    pruned.save_pretrained("smaller")
    study.live().set_ratio(0.3)  # no copy, no reload

Names are loaded when they are used: `import ppf` alone brings neither torch nor transformers. In a process that imports
both ppf and transformers, exported folders load without remote code.
"""

import importlib
from typing import Any

from ppf._hook import register_with_transformers

__version__ = "0.1.0"

_PUBLIC = {
    "fit": "ppf.recipes.api",
    "Study": "ppf.recipes.api",
    "Pruned": "ppf.recipes.prune",
    "ElasticModel": "ppf.llm.elastic",
    "Decision": "ppf.decide",
    "Decider": "ppf.decide",
    "PPFError": "ppf.errors",
    "InputError": "ppf.errors",
    "UnsupportedError": "ppf.errors",
    "DamagedError": "ppf.errors",
    "ResourceError": "ppf.errors",
    "InUseError": "ppf.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ppf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_transformers()
