"""Our own kernel with 8-bit activations, at every number of tokens."""
