"""The engines that run.py starts: flags and variables of their servers, and how many GPUs.

Run by itself it prints the variables that all have, for other uses of SGLang on the same host.
"""

from dataclasses import dataclass, field

EAGER = ("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph")
GRAPHS = ("--cuda-graph-bs-decode", "1", "2", "4", "--cuda-graph-bs-prefill", "64", "256")
OURS = {"HOPPER_MXFP4": "on"}
# SGLang adds FlashInfer's all-reduce by itself on Hopper, which would have to compile.
TP2 = ("--tp-size", "2", "--enforce-disable-flashinfer-allreduce-fusion")
EP2 = (*TP2, "--ep-size", "2")
DP2 = (*TP2, "--dp-size", "2", "--enable-dp-attention")


@dataclass(frozen=True)
class Mode:
    """One engine: a server, or one that prefills and one that decodes behind SGLang's router.

    variables: of the server, or of the one that prefills.
    decode: variables of the server that decodes; None where one server does both.
    transfer: SGLang's name of what carries the KV cache to the server that decodes.
    """

    flags: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    gpus: int = 1
    decode: dict[str, str] | None = None
    transfer: str = "nixl"


MODES = {
    "stock": Mode(EAGER),  # what SGLang takes of itself on Hopper: triton_kernel
    "ours": Mode(EAGER, OURS),
    "stock_graphs": Mode(GRAPHS),
    "ours_graphs": Mode(GRAPHS, OURS),
    "ours_flag": Mode((*EAGER, "--moe-runner-backend", "hopper_mxfp4")),
    "triton": Mode((*EAGER, "--moe-runner-backend", "triton")),  # experts unpacked to bf16
    "marlin": Mode((*EAGER, "--moe-runner-backend", "marlin")),
    "stock_tp2": Mode((*EAGER, *TP2), gpus=2),
    "ours_tp2": Mode((*EAGER, *TP2), OURS, gpus=2),
    "stock_tp2_graphs": Mode((*GRAPHS, *TP2), gpus=2),
    "ours_tp2_graphs": Mode((*GRAPHS, *TP2), OURS, gpus=2),
    "stock_ep2": Mode((*EAGER, *EP2), gpus=2),  # SGLang then unpacks the experts to bf16
    "ours_ep2": Mode((*EAGER, *EP2), OURS, gpus=2),
    "ours_ep2_graphs": Mode((*GRAPHS, *EP2), OURS, gpus=2),
    "stock_dp2": Mode((*EAGER, *DP2), gpus=2),
    "ours_dp2": Mode((*EAGER, *DP2), OURS, gpus=2),
    "stock_dp2_graphs": Mode((*GRAPHS, *DP2), gpus=2),
    "ours_dp2_graphs": Mode((*GRAPHS, *DP2), OURS, gpus=2),
    "stock_pd": Mode(EAGER, gpus=2, decode={}),
    "ours_pd": Mode(EAGER, OURS, gpus=2, decode=OURS),
    "mixed_pd": Mode(EAGER, gpus=2, decode=OURS),  # stock prefills, ours decodes
    "ours_pd_graphs": Mode(GRAPHS, OURS, gpus=2, decode=OURS),
    "ours_pd_tcp": Mode(EAGER, OURS, gpus=2, decode=OURS, transfer="mooncake_tcp"),
}
DEFAULT = "stock,ours,stock_graphs,ours_graphs,triton"
# Servers that start side by side take each other's memory for missing. A share this large, with a
# small pool of tokens, keeps each of them satisfied.
COMMON = (
    *("--mem-fraction-static", "0.6"),
    *("--max-total-tokens", "8192"),
    *("--max-running-requests", "8"),
    *("--context-length", "1024"),
    *("--chunked-prefill-size", "1024"),
    *("--attention-backend", "triton"),
    *("--sampling-backend", "pytorch"),
    *("--host", "127.0.0.1"),
    "--disable-radix-cache",
    "--disable-flashinfer-autotune",
    "--skip-tokenizer-init",
    "--skip-server-warmup",
)
VARIABLES = {
    # SGLang's own uses of FlashInfer would have to compile. This package's kernel does not ask.
    "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
    # Servers side by side: the memory of two GPUs is not equally free.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false",
    # The older one of SGLang's all-reduces shares memory by CUDA IPC. The newer one would take
    # torch's symmetric memory, and no server here is to set up NVLink multicast.
    "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2": "false",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    # SGLang's compiled one is built for torch 2.14 and would be handed tensors of 2.11.
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
    "SGLANG_HOST_IP": "127.0.0.1",
    "SGLANG_AUTO_NUMA_BIND": "false",  # it starts processes by numactl
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "4",
}


def references(name: str, run: set[str]) -> list[str]:
    """The modes of a run that a mode's tokens are held against: its own backend on one GPU without
    CUDA graphs, and stock SGLang laid out alike, or as much so as was run.
    """
    backend, _, layout = name.partition("_")
    alike = (layout, layout.removesuffix("_graphs"), "")
    groups = [[backend], [f"stock_{part}" if part else "stock" for part in alike]]
    found = [next((m for m in group if m in run and m != name), None) for group in groups]
    return [mode for mode in dict.fromkeys(found) if mode is not None]


def place(names: list[str], gpus: int) -> dict[str, list[int]]:
    """The GPUs of each mode, dealt out in turn.

    Raises ValueError for a mode that is not known or needs more GPUs than there are.
    """
    dealt: dict[int, int] = {}
    places = {}
    for name in names:
        if name not in MODES:
            raise ValueError(f"no mode {name!r}; there are {', '.join(MODES)}")
        need = MODES[name].gpus
        if need > gpus:
            raise ValueError(f"{name} needs {need} GPUs, and there are {gpus}")
        first = dealt.get(need, 0) % (gpus // need) * need
        dealt[need] = dealt.get(need, 0) + 1
        places[name] = list(range(first, first + need))
    return places


if __name__ == "__main__":  # for a shell: eval "$(python3 modes.py)"
    for variable, value in VARIABLES.items():
        print(f"export {variable}={value}")
