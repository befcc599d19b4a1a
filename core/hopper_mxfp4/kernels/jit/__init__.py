"""CUDA C++ compiled by NVRTC where it runs, kept in the cache, and launched."""
