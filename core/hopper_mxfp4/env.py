"""Every environment variable of the package, in one place.

Each is read when it is needed, never at import, so that a plugin imported early sees what a
launcher sets later. docs/configuration.md describes each one (a test checks that it does).
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    name: str
    default: str
    choices: tuple[str, ...] | None  # None: free text
    help: str

    def read(self) -> str:
        """The variable's value, lower-cased where it has fixed choices.

        Raises ValueError, naming the value seen and the choices, for any other value.
        """
        value = os.environ.get(self.name) or self.default
        if self.choices is None:
            return value
        value = value.lower()
        if value not in self.choices:
            raise ValueError(
                f"{self.name}={value!r} is not one of {', '.join(self.choices)}; set one of them "
                "or unset it"
            )
        return value

    def enabled(self) -> bool:
        """True for a switch that is set to 1."""
        return self.read() == "1"


MODE = Variable(
    "HOPPER_MXFP4",
    "off",
    ("off", "auto", "on"),
    "whether the framework plugins take over MXFP4 MoE layers: off, auto (where supported), on "
    "(take over or stop)",
)
KERNEL = Variable("HOPPER_MXFP4_KERNEL", "auto", None, "the kernel that kernel='auto' resolves to")
DETERMINISTIC = Variable(
    "HOPPER_MXFP4_DETERMINISTIC",
    "0",
    ("0", "1"),
    "1: sum the top-k experts of a token in a fixed order, so that equal calls give equal bytes",
)
BATCH_INVARIANT = Variable(
    "HOPPER_MXFP4_BATCH_INVARIANT",
    "0",
    ("0", "1"),
    "1: deterministic, and sums in the same order whatever the number of tokens, so that a token's "
    "bytes do not depend on its batch",
)
ACTIVATIONS = Variable(
    "HOPPER_MXFP4_ACTIVATIONS",
    "auto",
    ("auto", "bf16", "fp8"),
    "what tokens are multiplied as: bf16 as they come, or fp8, quantised in groups of 128; auto: "
    "what the framework itself would run for the checkpoint, and bf16 without one",
)
CACHE_DIR = Variable(
    "HOPPER_MXFP4_CACHE_DIR",
    "",
    None,
    "where compiled kernels lie, and where `hopper-mxfp4 tune` keeps what it measured",
)
ALLOW_UNSAFE_FLASHINFER = Variable(
    "HOPPER_MXFP4_ALLOW_UNSAFE_FLASHINFER",
    "0",
    ("0", "1"),
    "1: run on a FlashInfer release that is known to give wrong results on Hopper",
)

VARIABLES = (
    MODE,
    KERNEL,
    DETERMINISTIC,
    BATCH_INVARIANT,
    ACTIVATIONS,
    CACHE_DIR,
    ALLOW_UNSAFE_FLASHINFER,
)
