"""Which parameters are projected: names, groups, the split of a model."""
