"""smallbatch's compiled functions, for tiles of one size or the other."""

from functools import cache, partial

from hopper_mxfp4.contract import LayerShape
from hopper_mxfp4.kernels import gemms_and_sum, support
from hopper_mxfp4.kernels.gemms_and_sum import MAX_TOP_K, Compiled
from hopper_mxfp4.kernels.jit import sources
from hopper_mxfp4.kernels.jit.sources import Source
from hopper_mxfp4.kernels.smallbatch.tiling import MAX_PAIRS, tile_layer, tiles

tokens_at_once = partial(support.tokens_at_once, "smallbatch", MAX_TOP_K, MAX_PAIRS)


def source() -> Source:
    return sources.read(__package__, "smallbatch.cu")


def compile_all(shape: LayerShape) -> None:
    """Have everything for a layer of that shape in the cache. Raises RuntimeError."""
    for tile in tiles(shape):
        gemms_and_sum.compile_cubins(source(), tile_layer(shape, tile))


@cache
def compiled(shape: LayerShape, tile: int, device_index: int) -> Compiled:
    """Compile (or take from the cache) and load what a layer needs. Raises RuntimeError."""
    return gemms_and_sum.load(source(), tile_layer(shape, tile), device_index)
