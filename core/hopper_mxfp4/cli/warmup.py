"""`hopper-mxfp4 warmup`: compile ahead."""

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import click
from rich.console import Console

from hopper_mxfp4.cli.options import parse_workloads, progress, workloads_option


def kernel_that_compiles(context: click.Context, parameter: click.Parameter, value: str) -> Any:
    from hopper_mxfp4.registry import kernels

    known = {name: kernel for name, kernel in kernels().items() if hasattr(kernel, "compilations")}
    if value not in known:
        raise click.BadParameter(f"{value!r} is no kernel that compiles; give {', '.join(known)}")
    return known[value]


@click.command()
@workloads_option
@click.option(
    "--kernel",
    callback=kernel_that_compiles,
    default="native",
    show_default=True,
    help="The kernel that the servers will use, by the name that HOPPER_MXFP4_KERNEL takes.",
)
def warmup(workloads: list[str], kernel: Any) -> None:
    """Compile a kernel for these layers now, into the cache, so that no server waits for it. Takes
    all cores and needs no GPU.
    """
    shapes = [workload.shape for workload in parse_workloads(workloads)]
    wanted = list(dict.fromkeys(each for shape in shapes for each in kernel.compilations(shape)))
    cores = len(os.sched_getaffinity(0))
    # NVRTC compiles without Python's lock.
    with progress(Console()) as step, ThreadPoolExecutor(cores) as pool:
        step("compiled", 0, len(wanted))
        begun = [pool.submit(compilation.run) for compilation in wanted]
        try:
            for done, one in enumerate(as_completed(begun), start=1):
                one.result()
                step("compiled", done, len(wanted))
        except Exception as error:
            raise click.ClickException(str(error) or repr(error)) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
