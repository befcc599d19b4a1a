"""Run by a test as a process of its own: generate.py JOB, where the job file says model, prompts, tokens, options and answer."""

import os
import sys


def generate(job):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"],
        quantization="hopper_mxfp4",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=4,
        **job["options"],
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":  # vLLM's workers import this file again
    from hopper_mxfp4.demo import answer

    answer(sys.argv[1], generate)
