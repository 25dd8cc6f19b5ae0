"""One step on local tensors, without communication: rules, arithmetic of the split, rounding, kernels."""
