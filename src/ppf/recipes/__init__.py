"""The jobs: fit, prune, evaluate, demo. The only place where the two wings meet."""
