"""`hopper-mxfp4 demo`: a made checkpoint, a real engine, and transformers as the oracle.

Engine and oracle run in processes of their own, one after the other (bench/jobs.py).
`python -m hopper_mxfp4.cli.demo JOB` is the oracle.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hopper_mxfp4 import observe
from hopper_mxfp4.bench.jobs import JobFailed, answer, run_job
from hopper_mxfp4.contract import Call, PreparedExperts
from hopper_mxfp4.registry import adapters

TOKENS = 12
PROMPTS = [[5, 7, 9, 11, 300, 20], list(range(3, 203))]
# Two engines round bf16 at different places. Where the oracle's two best logits are closer than
# four bf16 steps of the better one, either token is right.
TIE = 2.0**-6


class DemoFailed(RuntimeError):
    """The demo can't go on; the message says where and what to do."""


@dataclass(frozen=True)
class CheckpointSizes:
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Row:
    prompt: str
    engine: list[int]
    oracle: list[int]
    verdict: str
    same: bool


@dataclass(frozen=True)
class Report:
    engine: str
    kernel: str
    calls: int
    layers: int
    load_s: float
    generate_s: float
    transformers: str
    rows: list[Row]

    @property
    def same(self) -> bool:
        return all(row.same for row in self.rows)


def run(framework: str, folder: Path, sizes: CheckpointSizes, console: Any) -> Report:
    """Do the whole demo under folder, with progress on a rich console. Raises DemoFailed."""
    adapter = adapters().get(framework)
    if adapter is None or adapter.demo is None:
        raise DemoFailed(
            f"no demo for framework {framework!r}; there is one for "
            f"{', '.join(a.framework for a in adapters().values() if a.demo)}"
        )
    from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = (folder / "checkpoint").resolve()
    size = write_gpt_oss(checkpoint, **asdict(sizes))
    console.print(
        f"checkpoint: GPT-OSS, {sizes}, {size / 1e6:.1f} MB in {checkpoint}",
        soft_wrap=True,
        highlight=False,
    )
    job = {"model": str(checkpoint), "prompts": PROMPTS, "tokens": TOKENS}
    engine = run_job(adapter.demo, job, folder / "engine", console)
    if not engine["kernel"] or not engine["calls"]:
        raise DemoFailed(
            "the engine generated, but not with this package's kernels: see "
            f"{folder / 'engine.log'}"
        )
    job["forced"] = engine["tokens"]
    oracle = run_job("hopper_mxfp4.cli.demo", job, folder / "oracle", console)
    rows = [
        compare_tokens(prompt, got, wanted, margins)
        for prompt, got, wanted, margins in zip(
            PROMPTS, engine["tokens"], oracle["tokens"], oracle["margins"], strict=True
        )
    ]
    report = Report(
        **{
            key: engine[key]
            for key in ("engine", "kernel", "calls", "layers", "load_s", "generate_s")
        },
        transformers=oracle["version"],
        rows=rows,
    )
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1))
    return report


def compare_tokens(
    prompt: list[int], got: list[int], wanted: list[int], margins: list[float]
) -> Row:
    """margins: how far below the oracle's best logit the engine's token lies, relative to it, given
    the engine's text so far.
    """
    text = (
        str(prompt)
        if len(prompt) < 10
        else f"[{prompt[0]}, {prompt[1]}, .. {prompt[-1]}] ({len(prompt)})"
    )
    if got == wanted:
        return Row(text, got, wanted, "yes", True)
    worst = max(margins)
    at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    tie = worst <= TIE
    verdict = f"{'near tie' if tie else 'NO'} at token {at}: {worst:.1%} below the best logit"
    return Row(text, got, wanted, verdict, tie)


def oracle(job: dict[str, Any]) -> dict[str, Any]:
    """transformers' own GPT-OSS on the same file, weights dequantised to bf16 by its own code, on
    the CPU.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).eval()
    tokens, margins = [], []
    with torch.inference_mode():
        for prompt, forced in zip(job["prompts"], job["forced"], strict=True):
            ids = torch.tensor([prompt])
            # Exactly what the engine is asked for: greedy, and on past any end-of-text token.
            out = model.generate(
                ids, do_sample=False, max_new_tokens=len(forced), min_new_tokens=len(forced)
            )
            tokens.append(out[0, len(prompt) :].tolist())
            logits = model(torch.tensor([prompt + forced])).logits[0, len(prompt) - 1 : -1].float()
            best = logits.max(-1).values
            chosen = logits.gather(1, torch.tensor(forced)[:, None])[:, 0]
            margins.append(((best - chosen) / best.abs()).tolist())
    return {"version": transformers.__version__, "tokens": tokens, "margins": margins}


CALLS: dict[str, int] = {}  # of `fused_moe` in this process since `count_calls`, by kernel


def count_calls(_model: Any = None) -> None:
    """Count calls in CALLS by kernel from now on. Takes a model as engines' per-rank callbacks
    do.
    """
    if _count not in observe.watchers:
        observe.watch(_count)


def _count(p: PreparedExperts, call: Call) -> None:
    CALLS[p.kernel.name] = CALLS.get(p.kernel.name, 0) + 1


@click.command()
@click.option(
    "--framework", default="vllm", show_default=True, help="The framework whose engine generates."
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where to work.",
)
@click.option("--layers", default=2, show_default=True, help="Layers of the checkpoint.")
@click.option("--hidden", default=192, show_default=True, help="Hidden size, a multiple of 32.")
@click.option(
    "--intermediate",
    default=192,
    show_default=True,
    help="Intermediate size of an expert, a multiple of 32.",
)
@click.option("--experts", default=8, show_default=True, help="Experts of a layer.")
@click.option("--top-k", default=4, show_default=True, help="Experts of a token.")
def demo(
    framework: str,
    folder: Path,
    layers: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
) -> None:
    """Make a small GPT-OSS checkpoint, generate from it with a real engine, and compare with
    transformers.
    """
    console = Console()
    sizes = CheckpointSizes(layers, hidden, intermediate, experts, top_k)
    try:
        report = run(framework, folder, sizes, console)
    except (DemoFailed, JobFailed) as failed:
        console.print(f"[red]{escape(str(failed))}[/]", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    table = Table(
        title=f"greedy tokens, {report.engine} with kernel {report.kernel} against "
        f"transformers {report.transformers}"
    )
    for column in ("prompt", report.engine, "transformers", "same"):
        table.add_column(column)
    for row in report.rows:
        table.add_row(row.prompt, str(row.engine), str(row.oracle), row.verdict)
    console.print(table)
    console.print(
        f"{report.layers} MXFP4 MoE layers taken over, kernel {report.kernel} called "
        f"{report.calls} times; "
        f"engine ready in {report.load_s:.1f} s, generated in {report.generate_s:.1f} s; files in "
        f"{folder}",
        soft_wrap=True,
        highlight=False,
    )
    if not report.same:
        raise SystemExit(1)


if __name__ == "__main__":
    answer(sys.argv[1], oracle)
