"""An objective is any function from allocations to damage; searches and the agent's training take it as it is.

Here: predicted damage, and a price on the KV cache, so that attention goes before FFN channels where both do as little harm.
"""

import numpy as np

from ppf import Decider, Decision
from ppf.config import Target
from ppf.learn.agent import Agent
from ppf.learn.objective import Objective, predicted
from ppf.learn.search import refine
from ppf.learn.train_agent import AgentConfig, train_agent
from ppf.space.layout import Layout


def with_cache_price(damage: Objective, layout: Layout, price: float) -> Objective:
    """Adds ``price`` nats/token for a whole KV cache, and in proportion for a smaller one."""
    cache = np.array([site.cache for site in layout.sites])
    whole = float(layout.units @ cache)

    def objective(kept: np.ndarray) -> np.ndarray:
        return damage(kept) + price * (kept @ cache) / whole

    return objective


def searched(decider: Decider, objective: Objective, ratio: float, steps: int = 60) -> Decision:
    """The best that a search at one ratio finds, from the agent's policy on."""
    target = Target(ratio=ratio)
    start = decider.decide(target).policy.keep
    rng = np.random.default_rng(0)
    found, _ = refine(objective, start[None], decider.budget(target).remove, decider.layout, steps, rng)
    return decider.adopt(target, found[0])


def taught(decider: Decider, objective: Objective, steps: int = 150) -> Agent:
    """An agent for every ratio, trained on the objective."""
    high = float(decider.agent.max_ratio)
    return train_agent(decider.agent, objective, decider.layout, 0.02, high, seed=0, config=AgentConfig(steps=steps))


def main(study: str = "runs/demo", ratio: float = 0.3, price: float = 0.2, steps: int = 150) -> tuple[Decision, Decision]:
    decider = Decider(study)
    objective = with_cache_price(predicted(decider.predictor), decider.layout, price)
    usual, alone = decider.decide(Target(ratio=ratio)), searched(decider, objective, ratio, steps)
    policy = taught(decider, objective, steps).propose(ratio)
    learnt = decider.decide(Target(ratio=ratio), policy)
    for name, decision in {"damage alone": usual, "searched": alone, "agent": learnt}.items():
        groups = sum(int(kept) for kept, site in zip(decision.allocation.kept, decider.layout.sites, strict=True) if site.cache)
        print(f"{name:<13} {groups} KV groups, predicted damage {decision.prediction.damage[0]:.4f} nats/token")
    return usual, alone


if __name__ == "__main__":
    main()
