"""What wide8 has compiled; wide's launch.py compiles and launches it."""

from hopper_mxfp4.contract import LayerShape
from hopper_mxfp4.kernels.wide.launch import compile_cubins
from hopper_mxfp4.kernels.wide8.tiling import cut_layer


def compile_all(shape: LayerShape) -> None:
    """Have everything for a layer of that shape in the cache. Raises RuntimeError."""
    for tiling in cut_layer(shape):
        compile_cubins(tiling)
