"""What both vLLM rigs do with a running engine: generate, and look at every position's logits."""

from typing import Any

from tokens import NEW_TOKENS, PROMPTS, TOP_LOGPROBS, Answer

# Sums over ranks by NCCL and by vLLM's own kernel for small ones, none of which needs NVLink's
# multicast: not every host of several GPUs has it.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}


def generate(llm: Any, prompts: list[list[int]]) -> list[Answer]:
    """Greedy answers, of the same length whatever token ends a text. The prompts run together."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=TOP_LOGPROBS,
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): entry.logprob for token, entry in step.items()}
                for step in output.outputs[0].logprobs
            ],
        }
        for output in outputs
    ]


def prompt_logits(llm: Any) -> list:
    """The logits at each position of each prompt, alone. The engine must run in this process."""
    import torch
    from vllm import SamplingParams

    seen: list = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen.append(output.float().cpu())

    def watch(model: Any) -> None:
        model.logits_processor.register_forward_hook(keep)

    llm.apply_model(watch)
    once = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    logits = []
    for prompt in PROMPTS:
        seen.clear()
        llm.generate([{"prompt_token_ids": prompt}], once, use_tqdm=False)
        logits.append(torch.cat(seen)[: len(prompt)])
    return logits
