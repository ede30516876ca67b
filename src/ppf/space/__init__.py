"""What a pruned model is, in plain numbers: sites, budgets, policies, allocations, importance, masks. numpy only."""
