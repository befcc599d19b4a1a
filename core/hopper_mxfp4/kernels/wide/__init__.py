"""Our own kernel for many tokens an expert."""
