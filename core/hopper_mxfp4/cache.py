"""The user's cache directory: tactic tables and compiled kernels, private to the user, written all
or nothing.
"""

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from hopper_mxfp4 import env


def folder(name: str, make: bool = False) -> Path:
    """A folder of the cache, HOPPER_MXFP4_CACHE_DIR/name or where the system keeps caches.

    make: create it, private to the user. Raises OSError where that fails, where there is no home,
    and where others than the user could write to an existing one: what lies there is run or steers
    what is run.
    """
    chosen = env.CACHE_DIR.read()
    if chosen:
        path = Path(chosen) / name
    else:
        import platformdirs

        path = platformdirs.user_cache_path("hopper-mxfp4") / name
    if make:
        for part in reversed([path, *path.parents]):
            part.mkdir(
                exist_ok=True, mode=0o700
            )  # with parents=True only the last would have that mode
    if path.is_dir():
        status = path.stat()
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise PermissionError(
                f"{path} can be written by others than its user; chmod 700 it or choose another "
                f"with {env.CACHE_DIR.name}"
            )
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file: a reader sees the old or the new, never a part. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON value: a reader sees the old or the new, never a part. Raises
    OSError.
    """
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())
