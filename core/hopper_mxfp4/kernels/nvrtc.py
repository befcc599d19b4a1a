"""CUDA C++ compiled at the user's by NVRTC, which torch's CUDA builds bring along: no toolchain needed.

What is compiled is kept in the cache directory, by a hash of everything it was made from.
"""

import ctypes
import hashlib
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cache import folder, write_bytes

logger = logging.getLogger(__name__)

INSTALL = "install cuda-bindings and nvidia-cuda-nvrtc for torch's CUDA release (torch's own CUDA wheels bring both)"


@cache
def problem() -> str | None:
    """Why nothing can be compiled here and what to install, in a sentence; None if it can."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        _check(nvrtc.nvrtcVersion())
    except Exception as error:  # no package, no library or a broken one: any of it is the reason
        return f"NVRTC can't be used ({type(error).__name__}: {error}); {INSTALL}"
    return None


def compile_cubin(source: str, name: str, macros: dict[str, int], arch: str = "sm_90a") -> bytes:
    """CUDA C++ source to a cubin, from the cache where it is there.

    name: for messages. macros: defined before the first line. arch: as NVRTC's --gpu-architecture.
    Raises RuntimeError with the compiler's log.
    """
    from cuda.bindings import nvrtc

    options = [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "-default-device",
        *(f"-D{k}={v}" for k, v in sorted(macros.items())),
    ]
    key = hashlib.sha256(
        "\0".join((source, *options, str(_check(nvrtc.nvrtcVersion())))).encode()
    ).hexdigest()
    cached = _cached(f"{Path(name).stem}-{key[:40]}.cubin")
    if cached is not None and cached.exists():
        found = _read(cached)
        if found:
            return found
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        encoded = [option.encode() for option in options]
        if int(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]):
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(
                f"{name} does not compile with {' '.join(options)}:\n{log.decode(errors='replace').strip()}"
            )
        cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    if cached is not None:
        try:
            write_bytes(cached, hashlib.sha256(cubin).digest() + cubin)
        except OSError as error:
            logger.warning("compiled kernels can't be kept in the cache: %s", error)
    return cubin


def _cached(name: str) -> Path | None:
    try:
        return folder("kernels", make=True) / name
    except (OSError, ImportError) as error:
        logger.warning("the cache of compiled kernels is not used: %s", error)
        return None


def _read(path: Path) -> bytes | None:
    """A cached cubin; None where the file is not one that was written whole. A driver would crash on some of those."""
    try:
        content = path.read_bytes()
    except OSError as error:
        logger.warning("ignored: %s", error)
        return None
    digest, cubin = content[:32], content[32:]
    if hashlib.sha256(cubin).digest() != digest:
        logger.warning("ignored: %s is damaged; it is compiled anew", path)
        return None
    return cubin


def load(cubin: bytes, names: tuple[str, ...], shared_bytes: int, device_index: int) -> list[int]:
    """Handles of a cubin's functions, loaded in torch's context of that GPU and never unloaded.

    shared_bytes: the most dynamic shared memory that the first of them is launched with. Raises RuntimeError.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # torch makes the context when it first needs it
        module = _check(driver.cuModuleLoadData(cubin))
        functions = [_check(driver.cuModuleGetFunction(module, name.encode())) for name in names]
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(functions[0], attribute, shared_bytes))
    return [int(function) for function in functions]


class LaunchConfig(NamedTuple):
    """address: of the driver's CUlaunchConfig, which keep owns."""

    address: int
    keep: Any


def launch_config(
    grid: tuple[int, int], threads: int, shared_bytes: int, stream: int, early: bool
) -> LaunchConfig:
    """A launch configuration. early: the kernel may begin before the one before it ends, and waits for it itself."""
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
    """parameters: address of an array of pointers to the kernel's arguments. Raises RuntimeError."""
    code = _driver_launch()(config.address, function, parameters, None)
    if code:
        from cuda.bindings import driver

        raise RuntimeError(f"the launch failed: {driver.CUresult(code)!r}")


def _check(result: tuple[Any, ...]) -> Any:
    code, *values = result
    if int(code):
        raise RuntimeError(f"{code!r}")
    return values[0] if len(values) == 1 else tuple(values)
