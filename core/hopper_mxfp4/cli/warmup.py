"""`hopper-mxfp4 warmup`: compile ahead."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
from rich.console import Console

from hopper_mxfp4.cli.options import parse_workloads, progress, workloads_option

# Which of our own kernels a choice of HOPPER_MXFP4_KERNEL needs; native is what `auto` takes, and
# native8 with 8-bit activations.
COMPILED = {
    "flashinfer": (),
    "native": ("narrow", "wide"),
    "narrow": ("narrow",),
    "wide": ("wide",),
    "native8": ("narrow8", "wide8"),
    "narrow8": ("narrow8",),
    "wide8": ("wide8",),
}


@click.command()
@workloads_option
@click.option(
    "--kernel",
    type=click.Choice([*COMPILED]),
    default="native",
    show_default=True,
    help="The kernel that the servers will use.",
)
def warmup(workloads: list[str], kernel: str) -> None:
    """Compile our own kernels for these layers now, into the cache, so that no server waits for
    them. Needs no GPU.
    """
    from hopper_mxfp4.kernels.flashinfer import staging
    from hopper_mxfp4.kernels.jit import nvrtc

    chosen = parse_workloads(workloads)
    if reason := nvrtc.problem():
        raise click.ClickException(reason)
    compilers: list[Callable[[Any], None]] = [
        import_module(f"hopper_mxfp4.kernels.{name}.launch").compile_all
        for name in COMPILED[kernel]
    ]
    with progress(Console()) as step:
        if kernel == "flashinfer":  # whose inputs a kernel of ours stages
            staging.compile_kernel()
        for done, workload in enumerate(chosen):
            step(workload.name, done, len(chosen))
            for compile_all in compilers:
                compile_all(workload.shape)
        step("done", len(chosen), len(chosen))
