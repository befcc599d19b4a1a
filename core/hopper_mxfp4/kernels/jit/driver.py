"""Compiled kernels loaded and launched through the CUDA driver."""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch

from hopper_mxfp4 import observe
from hopper_mxfp4.kernels.jit.nvrtc import checked


def load(cubin: bytes, names: tuple[str, ...], shared_bytes: int, device_index: int) -> list[int]:
    """Handles of a cubin's functions, loaded in torch's context of that GPU and never unloaded.

    shared_bytes: the most dynamic shared memory that the first of them is launched with.
    Raises RuntimeError.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # torch makes the context when it first needs it
        module = checked(driver.cuModuleLoadData(cubin))
        functions = [checked(driver.cuModuleGetFunction(module, name.encode())) for name in names]
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(functions[0], attribute, shared_bytes))
    return [int(function) for function in functions]


class LaunchConfig(NamedTuple):
    """address: of the driver's CUlaunchConfig, which keep owns."""

    address: int
    keep: Any


def launch_config(
    grid: tuple[int, int], threads: int, shared_bytes: int, stream: int, early: bool
) -> LaunchConfig:
    """early: the kernel may start before the one before it has ended, and waits for it itself."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    if early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    return LaunchConfig(config.getPtr(), config)


@cache
def _driver_launch() -> Any:
    """cuLaunchKernelEx by ctypes: cuda.bindings' own takes the host some 4 us more a launch."""
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes, function.restype = [ctypes.c_void_p] * 4, ctypes.c_int
    return function


def launch(config: LaunchConfig, function: int, parameters: int) -> None:
    """parameters: address of an array of pointers to the arguments. Raises RuntimeError."""
    if not observe.launching:
        return
    code = _driver_launch()(config.address, function, parameters, None)
    if code:
        from cuda.bindings import driver

        raise RuntimeError(f"the launch failed: {driver.CUresult(code)!r}")
