"""Random weights for whole models in a framework's engine, whose own dummy weights send every token
to the same experts or leave experts as their memory was.
"""

import zlib

import torch

EXPERT_SCALES = (118, 122)  # E8M0 bytes, from one to below the other: 2**-9 to 2**-6


def generator_of(name: str, device: torch.device) -> torch.Generator:
    """Of each tensor its own, since ranks may have different numbers of those before it."""
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def fill_parameters(model: torch.nn.Module, e8m0: tuple[int, int] = EXPERT_SCALES) -> None:
    """Weights that keep activations of order one and route evenly; random bits for the experts.

    What every rank holds is the same on all of them, as the router must be; and so are their shards
    of what is split, where these have the same shape.

    e8m0: from and below which bytes the parameters of that dtype are.
    """
    for name, parameter in model.named_parameters():
        t = parameter.data
        if t.dim() == 0:
            continue  # a scale of the KV cache, which says by its value that none was loaded
        g = generator_of(name, t.device)
        if t.dtype in (torch.uint8, torch.int8, torch.float8_e8m0fnu):
            packed = EXPERT_SCALES if "scale" in name else (0, 256)
            bounds = e8m0 if t.dtype == torch.float8_e8m0fnu else packed
            t.view(torch.uint8).random_(*bounds, generator=g)
        elif t.dtype == torch.float8_e4m3fn:
            t.copy_(torch.empty(t.shape, device=t.device).normal_(0, 1, generator=g))
        elif "norm" in name:
            t.fill_(1)
        elif "scale_inv" in name:
            t.fill_(2.0**-6)  # of weights of order one
        elif t.is_floating_point():
            t.normal_(0, 1.0 if "embed" in name else 0.02, generator=g)
