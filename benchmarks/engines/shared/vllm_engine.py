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


def watch_logits(model: Any) -> None:
    """From now on a rank's model keeps its logits, for `take_logits`."""
    model.seen_logits = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        # Ranks may have no logits, or those of their own part of the vocabulary.
        if output is not None and output.shape[-1] == module.org_vocab_size:
            model.seen_logits.append(output.float().cpu())

    model.logits_processor.register_forward_hook(keep)


def take_logits(model: Any) -> list:
    seen, model.seen_logits = model.seen_logits, []
    return seen


def prompt_logits(llm: Any) -> list:
    """The logits at each position of each prompt, alone, as the first rank has them.

    Raises RuntimeError where it did not have them all.
    """
    import torch
    from vllm import SamplingParams

    llm.apply_model(watch_logits)
    once = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    logits = []
    for prompt in PROMPTS:
        llm.apply_model(take_logits)
        llm.generate([{"prompt_token_ids": prompt}], once, use_tqdm=False)
        seen = llm.apply_model(take_logits)[0]
        positions = sum(map(len, seen))
        if positions < len(prompt):
            raise RuntimeError(f"saw logits of {positions} of {len(prompt)} positions")
        logits.append(torch.cat(seen)[: len(prompt)])
    return logits
