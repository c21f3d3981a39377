"""Methods of the weight space: they act on where the weights go."""
