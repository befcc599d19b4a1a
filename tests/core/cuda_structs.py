"""Structs as our CUDA sources declare them, to hold what Python hands over against."""

import ctypes
import re
from typing import Any

from hopper_mxfp4.kernels.jit.sources import Source


class Pairs(ctypes.Structure):
    """routing.cuh's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("topk_ids", "expert_map")),
        *((name, ctypes.c_int) for name in ("num_pairs", "top_k", "ids_are_int64")),
        *((name, ctypes.c_int) for name in ("ids_token_stride", "ids_choice_stride", "num_ids")),
        ("top_k_reciprocal", ctypes.c_uint),
    ]


_TYPES = {
    "int": ctypes.c_int,
    "u32": ctypes.c_uint,
    "float": ctypes.c_float,
    "long long": ctypes.c_longlong,
}


def declared_fields(
    name: str, *sources: Source, nested: dict[str, Any] | None = None
) -> list[tuple[str, Any]]:
    """A struct's fields, as ctypes' `_fields_` lists them.

    nested: the structs that it has members of, by name. Raises KeyError for any other type.
    """
    text = "\n".join(part for source in sources for part in (*source.headers.values(), source.text))
    found = re.search(rf"^struct {name} {{$(.*?)^}};$", text, re.MULTILINE | re.DOTALL)
    assert found, f"no struct {name}"
    types = _TYPES | (nested or {})
    fields = re.sub("//.*", "", found[1]).split("DEVICE")[0]  # its functions come last
    declared = []
    for line in fields.split(";")[:-1]:
        first, *others = line.replace("const ", "").split(",")
        of, last = first.strip().rsplit(maxsplit=1)
        pointer = of.endswith("*") or last.startswith("*")
        for one in (last, *others):
            is_pointer = pointer or one.strip().startswith("*")
            declared.append((one.strip(" *"), ctypes.c_void_p if is_pointer else types[of]))
    return declared
