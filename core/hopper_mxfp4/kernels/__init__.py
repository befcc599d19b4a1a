"""Kernels, a package each, and `select`, which picks one."""
