"""The bytes that our own kernels for any number of tokens read."""
