"""What the package itself registers, as a plugin like any other. It comes first, so that "auto"
asks its kernels first.
"""

from collections.abc import Callable

from hopper_mxfp4.checkpoint.families import DEEPSEEK_V4, GPT_OSS, CheckpointFamily
from hopper_mxfp4.contract import Kernel
from hopper_mxfp4.hookspecs import hookimpl
from hopper_mxfp4.kernels.flashinfer.kernel import FlashInferKernel
from hopper_mxfp4.kernels.narrow.kernel import NarrowKernel
from hopper_mxfp4.kernels.narrow8.kernel import Narrow8Kernel
from hopper_mxfp4.kernels.native import Native8Kernel, NativeKernel
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from hopper_mxfp4.kernels.wide.kernel import WideKernel
from hopper_mxfp4.kernels.wide8.kernel import Wide8Kernel


@hookimpl(tryfirst=True)
def register_families(register: Callable[[CheckpointFamily], None]) -> None:
    register(GPT_OSS)
    register(DEEPSEEK_V4)


@hookimpl(tryfirst=True)
def register_kernels(register: Callable[[Kernel], None]) -> None:
    for kernel in (
        NativeKernel(),
        NarrowKernel(),
        WideKernel(),
        Native8Kernel(),
        Narrow8Kernel(),
        Wide8Kernel(),
        FlashInferKernel(),
        ReferenceKernel(),
    ):
        register(kernel)
