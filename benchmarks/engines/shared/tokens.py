"""What every rig asks its engines, and the one comparison of what they answer.

An answer is what an engine made of a prompt, as it stands in the rigs' JSON:

    {"tokens": [17, 4, ..], "logprobs": [{"17": -0.1, "4": -2.5, ..}, ..]}

with the log-probabilities of the best few tokens at each step. The keys are strings because JSON
has no others.
"""

import json
from pathlib import Path
from typing import TypedDict

# A short prompt, a long one, one without order, one that repeats itself. All ids are below 1,003:
# the made checkpoints have vocabularies of 1,024 and 4,096 entries and no tokenizer.
PROMPTS = [
    [5, 7, 9, 11, 300, 20],
    list(range(3, 203)),
    [(37 * i) % 1000 + 3 for i in range(64)],
    [9, 8, 7] * 20,
]
NEW_TOKENS = 16
TOP_LOGPROBS = 5


class Answer(TypedDict):
    tokens: list[int]
    logprobs: list[dict[str, float]]


def where_they_part(first: list[int], other: list[int]) -> int | None:
    """The first position at which two lists differ; None where one begins with all of the other."""
    pairs = zip(first, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def margin(answer: Answer, at: int) -> float | None:
    """By how many nats a token was preferred to the next best one: 0 for a tie.

    None where the engine reported no log-probability for the token or none to hold it against.
    """
    chosen = str(answer["tokens"][at])
    reported = answer["logprobs"][at]
    others = [logprob for token, logprob in reported.items() if token != chosen]
    if chosen not in reported or not others:
        return None
    return reported[chosen] - max(others)


def verdict(first: Answer, other: Answer, name: str) -> str:
    """One line about two answers to the same prompt. name: whose the first is.

    Where the first engine's choice was close, rounding explains that another engine chose
    differently, and all that follows is then about different texts.
    """
    at = where_they_part(first["tokens"], other["tokens"])
    if at is not None:
        by = margin(first, at)
        chose = "chose by an unknown margin" if by is None else f"chose by {by:.4f} nats"
        return f"part at token {at}, where {name} {chose}"
    lengths = len(first["tokens"]), len(other["tokens"])
    return "equal" if lengths[0] == lengths[1] else f"{lengths[0]} and {lengths[1]} tokens"


def largest_logprob_difference(first: Answer, other: Answer) -> float:
    """Over the steps at which both engines had the same text before them."""
    at = where_they_part(first["tokens"], other["tokens"])
    steps = zip(first["logprobs"], other["logprobs"], strict=False)
    return max(
        (
            abs(a[token] - b[token])
            for a, b in list(steps)[: None if at is None else at + 1]
            for token in a.keys() & b.keys()
        ),
        default=0.0,
    )


def distinct_tokens(answers: list[Answer]) -> int:
    """How many different tokens were generated. Where they are few, equal answers prove little."""
    return len({token for answer in answers for token in answer["tokens"]})


def compare(first: list[Answer], other: list[Answer], name: str) -> dict:
    """Two engines' answers to the same prompts. name: whose the first are."""
    pairs = list(zip(first, other, strict=True))
    return {
        "tokens": [verdict(a, b, name) for a, b in pairs],
        "largest_logprob_difference": round(
            max((largest_logprob_difference(a, b) for a, b in pairs), default=0.0), 4
        ),
        "distinct_tokens": distinct_tokens(first),
    }


def compare_logits(first: Path, other: Path) -> dict:
    """Two files of every prompt's logits, a tensor [positions, vocabulary] each."""
    import torch

    pairs = list(zip(torch.load(first), torch.load(other), strict=True))
    a, b = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    return {
        "relative_l2": ((a - b).norm() / a.norm()).item(),
        "max_logit_difference": max((a - b).abs().max().item() for a, b in pairs),
        "mean_logit_difference": sum((a - b).abs().mean().item() for a, b in pairs) / len(pairs),
        "largest_logit": max(a.abs().max().item() for a, _ in pairs),
        "logit_std": torch.cat([a for a, _ in pairs]).std().item(),
        "same_argmax": [
            f"{(a.argmax(-1) == b.argmax(-1)).sum().item()}/{len(a)}" for a, b in pairs
        ],
    }


def logits_beside(result: Path) -> Path:
    """Where a mode's logits lie, given the file of its result."""
    return result.with_suffix(".logits.pt")


def compare_results(first: Path, other: Path) -> dict:
    """Two modes' results: their answers, and their logits where both have them."""
    a, b = (json.loads(path.read_text()) for path in (first, other))
    found = compare(a["answers"], b["answers"], a["mode"])
    logits = logits_beside(first), logits_beside(other)
    if all(path.exists() for path in logits):
        found |= compare_logits(*logits)
    return found
