"""What is known of model families."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelsConfig:
    """List the model families: what can be removed from each, and which programs run the result."""

    json: bool = False
    """Print strict JSON."""
