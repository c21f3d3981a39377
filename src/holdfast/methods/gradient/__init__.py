"""Methods of the gradient space: they act on how the weights move."""
