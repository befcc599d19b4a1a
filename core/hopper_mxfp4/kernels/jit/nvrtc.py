"""CUDA C++ compiled at the user's by NVRTC, which torch's CUDA builds bring along: no toolchain
needed.

What is compiled is kept in the cache directory, by a hash of everything it was made from; where
that can't be, in the process.
"""

import hashlib
import logging
import threading
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

from hopper_mxfp4.cache import folder, write_bytes
from hopper_mxfp4.kernels.jit.sources import Source

logger = logging.getLogger(__name__)

INSTALL = (
    "install cuda-bindings and nvidia-cuda-nvrtc for torch's CUDA release "
    "(torch's own CUDA wheels bring both)"
)

# By cache key, what a thread compiles now: others that want it wait for it.
_under_way: dict[str, Future[bytes]] = {}
_unwritten: dict[str, bytes] = {}  # by cache key, what the cache directory could not take
_lock = threading.Lock()


@cache
def problem() -> str | None:
    """Why nothing can be compiled here and what to install, in a sentence; None if it can."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        checked(nvrtc.nvrtcVersion())
    except Exception as error:  # no package, no library or a broken one: any of it is the reason
        return f"NVRTC can't be used ({type(error).__name__}: {error}); {INSTALL}"
    return None


def compile_cubin(source: Source, macros: dict[str, int], arch: str = "sm_90a") -> bytes:
    """CUDA C++ source to a cubin, from the cache where it is there.

    macros: defined before the first line. arch: as NVRTC's --gpu-architecture.
    Raises RuntimeError with the compiler's log, or with what `problem` says.
    """
    if reason := problem():
        raise RuntimeError(reason)
    from cuda.bindings import nvrtc

    options = [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "-default-device",
        *(f"-D{k}={v}" for k, v in sorted(macros.items())),
    ]
    headers = [part for header in source.headers.items() for part in header]
    version = str(checked(nvrtc.nvrtcVersion()))
    key = hashlib.sha256("\0".join((source.text, *headers, *options, version)).encode()).hexdigest()
    with _lock:
        other = _under_way.get(key)
        if other is None:
            own = _under_way[key] = Future()
    if other is not None:
        return other.result()
    try:
        own.set_result(_cached_or_compiled(source, options, key))
    except BaseException as error:
        own.set_exception(error)
    finally:
        with _lock:
            del _under_way[key]
    return own.result()


def _cached_or_compiled(source: Source, options: list[str], key: str) -> bytes:
    if key in _unwritten:
        return _unwritten[key]
    cached = _cached(f"{Path(source.name).stem}-{key[:40]}.cubin")
    if cached is not None and cached.exists():
        found = _read(cached)
        if found:
            return found
    cubin = _compile(source, options)
    if cached is None or not _written(cached, cubin):
        _unwritten[key] = cubin
    return cubin


def _compile(source: Source, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    names = [name.encode() for name in source.headers]
    texts = [text.encode() for text in source.headers.values()]
    program = checked(
        nvrtc.nvrtcCreateProgram(
            source.text.encode(), source.name.encode(), len(names), texts, names
        )
    )
    try:
        encoded = [option.encode() for option in options]
        if int(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]):
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(
                f"{source.name} does not compile with {' '.join(options)}:\n"
                f"{log.decode(errors='replace').strip()}"
            )
        cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _cached(name: str) -> Path | None:
    try:
        return folder("kernels", make=True) / name
    except (OSError, ImportError) as error:
        logger.warning("the cache of compiled kernels is not used: %s", error)
        return None


def _written(path: Path, cubin: bytes) -> bool:
    try:
        write_bytes(path, hashlib.sha256(cubin).digest() + cubin)
    except OSError as error:
        logger.warning("compiled kernels can't be kept in the cache: %s", error)
        return False
    return True


def _read(path: Path) -> bytes | None:
    """A cached cubin; None where the file was not written whole: a driver would crash on some."""
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


def checked(result: tuple[Any, ...]) -> Any:
    """What a function of cuda.bindings returned beside its code. Raises RuntimeError on errors."""
    code, *values = result
    if int(code):
        raise RuntimeError(f"{code!r}")
    return values[0] if len(values) == 1 else tuple(values)
