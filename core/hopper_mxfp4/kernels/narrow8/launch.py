"""What narrow8 has compiled; narrow's launch.py compiles and launches it."""

from functools import partial

from hopper_mxfp4.kernels.narrow import launch
from hopper_mxfp4.kernels.narrow8.tiling import Gemm8

compile_all = partial(launch.compile_all, kind=Gemm8)
