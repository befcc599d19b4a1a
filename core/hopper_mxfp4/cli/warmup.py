"""`hopper-mxfp4 warmup`: compile ahead."""

import click
from rich.console import Console

from hopper_mxfp4.cli.options import parse_workloads, progress, workloads_option


@click.command()
@workloads_option
def warmup(workloads: list[str]) -> None:
    """Compile the decode kernel for these layers now, into the cache, so that no server waits for
    it. Needs no GPU.
    """
    from hopper_mxfp4.kernels.flashinfer import staging
    from hopper_mxfp4.kernels.jit import nvrtc
    from hopper_mxfp4.kernels.smallbatch.kernel import compile_all

    chosen = parse_workloads(workloads)
    if reason := nvrtc.problem():
        raise click.ClickException(reason)
    with progress(Console()) as step:
        staging.compile_kernel()
        for done, workload in enumerate(chosen):
            step(workload.name, done, len(chosen))
            compile_all(workload.shape)
        step("done", len(chosen), len(chosen))
