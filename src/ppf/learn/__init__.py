"""Everything that learns about masks: predictors, objectives, baselines, the agent. Never a language model."""
