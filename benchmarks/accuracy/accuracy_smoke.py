#!/usr/bin/env python3
"""Try the evaluation's plumbing without a real model.

    accuracy_smoke.py [--lm-eval COMMAND] [FOLDER]

Writes a small checkpoint, a tokenizer and an lm-eval task of ten questions whose right answers are
what transformers generates from the same file; serves the checkpoint twice with the plugin, lets
lm-eval ask both servers, and compares. The last question's answer is wrong on purpose, so 90% is
the score to expect. Run it in the environment that has vLLM and hopper-mxfp4[demo]; lm_eval[api]
may be in another.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from accuracy_compare import table

from hopper_mxfp4.checkpoint.random_gpt_oss import VOCABULARY, write_gpt_oss

NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"  # gsm8k's flexible-extract
TOKENS = 12
WORDS = ["Question", "Answer", "What", "is", "plus", ":", "?"]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
TASK = {
    "task": "smoke",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "num_fewshot": 0,
    "generation_kwargs": {"until": ["Question:", "</s>"], "do_sample": False, "temperature": 0.0},
    "filter_list": [
        {
            "name": "flexible-extract",
            "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": NUMBER},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def write_tokenizer(folder: Path) -> None:
    """A word is a token: three special ones, the numbers to 999, and the questions' words."""
    vocabulary = ["<pad>", "<unk>", "</s>", *map(str, range(1000)), *WORDS]
    assert len(vocabulary) <= VOCABULARY
    vocabulary += [f"<spare{i}>" for i in range(VOCABULARY - len(vocabulary))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": vocabulary[i], "special": True} | dict.fromkeys(FLAGS, False)
            for i in range(3)
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(vocabulary)},
            "unk_token": "<unk>",
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 4096}))


def write_task(folder: Path, checkpoint: Path) -> None:
    """The questions, with transformers' greedy answers as the right ones."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    questions = [
        f"What is {a} plus {b} ?"
        for a, b in zip(range(11, 700, 71), range(3, 300, 29), strict=False)
    ]
    prompts = [tokenizer.encode(f"Question: {question}\nAnswer:").ids for question in questions]
    job = {
        "model": str(checkpoint),
        "prompts": prompts,
        "forced": [[0] * TOKENS] * len(prompts),
        "answer": str(folder / "oracle.json"),
    }
    (folder / "oracle.job.json").write_text(json.dumps(job))
    with (folder / "oracle.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "hopper_mxfp4.cli.demo", folder / "oracle.job.json"],
            stdout=log,
            stderr=log,
            check=True,
        )
    texts = [
        tokenizer.decode(tokens)
        for tokens in json.loads((folder / "oracle.json").read_text())["tokens"]
    ]
    answers = [next(filter(None, re.findall(NUMBER, text)[-1])) for text in texts]
    answers[-1] += "1"
    rows = [
        json.dumps({"question": q, "answer": a}) for q, a in zip(questions, answers, strict=True)
    ]
    (folder / "smoke.jsonl").write_text("\n".join(rows) + "\n")
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "smoke.jsonl")}}}
    (folder / "smoke.yaml").write_text(json.dumps(task, indent=1))  # JSON is YAML


@contextlib.contextmanager
def served(checkpoint: Path, log_file: Path) -> Iterator[str]:
    """A vllm server with the plugin, for as long as the block lasts; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        f"--host 127.0.0.1 --port {port} --quantization hopper_mxfp4 --enforce-eager "
        "--max-model-len 512 --max-num-seqs 4"
    )
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    } | os.environ
    # What `vllm serve` starts. That command itself ends at once in vllm-cpu 0.32.0, because it
    # looks for a distribution named vllm.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(checkpoint),
        "--served-model-name",
        "smoke",
    ]
    with log_file.open("w") as log:
        server = subprocess.Popen(
            [*command, *options.split()], stdout=log, stderr=log, env=env, start_new_session=True
        )
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit(
                    f"the server ended with status {server.returncode}: see {log_file}"
                )
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(1)
        else:
            raise SystemExit(f"no server after ten minutes: see {log_file}")
        took_over = re.findall(r"hopper-mxfp4 takes over.*", log_file.read_text())
        if not took_over:
            raise SystemExit(f"the plugin did not take over: see {log_file}")
        print(f"{log_file.stem}: {took_over[0]}", flush=True)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # whatever of its group is left


def evaluate(lm_eval: str, address: str, folder: Path, name: str) -> None:
    """As gsm8k is asked of a real server, but through the completions endpoint.

    GPT-OSS's chat format would need the real vocabulary.
    """
    arguments = {
        "model": "smoke",
        "base_url": f"{address}/v1/completions",
        "tokenizer_backend": "none",
        "num_concurrent": 4,
    }
    generation = {"max_gen_toks": TOKENS, "min_tokens": TOKENS}
    command = [
        *lm_eval.split(),
        "run",
        "--model",
        "local-completions",
        "--model_args",
        json.dumps(arguments),
        "--tasks",
        "smoke",
    ]
    command += [
        "--include_path",
        str(folder),
        "--gen_kwargs",
        json.dumps(generation),
        "--output_path",
        str(folder / name),
        "--log_samples",
    ]
    env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")} | os.environ
    subprocess.run(command, env=env, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(".demo/accuracy"),
        help="where to work (default: %(default)s)",
    )
    parser.add_argument(
        "--lm-eval", default="lm_eval", help="the lm_eval command, where it is not on PATH"
    )
    options = parser.parse_args()
    work = options.folder.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if list(work.glob("*/*/samples_*.jsonl")):
        raise SystemExit(
            f"{work} has an earlier run's answers, which would count as repeats: "
            "remove it, or name another folder"
        )
    checkpoint = work / "checkpoint"
    write_gpt_oss(checkpoint, layers=2, hidden=192, intermediate=192, experts=8, top_k=4)
    write_tokenizer(checkpoint)
    write_task(work, checkpoint)
    for name in ("first", "second"):
        with served(checkpoint, work / f"{name}.log") as address:
            evaluate(options.lm_eval, address, work, name)
    print(table(work / "first", work / "second"))


if __name__ == "__main__":
    main()
