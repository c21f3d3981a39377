"""Methods of the output space: they act on what the model says."""
