"""The `smallbatch` kernel: our own, for few tokens an expert."""
