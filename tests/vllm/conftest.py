"""The vLLM adapter against a real vLLM.

Skipped where none is installed; `make test` installs one.
"""

import os
from importlib.util import find_spec

import pytest

# Before anything imports vLLM.
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss

    folder = tmp_path_factory.mktemp("checkpoint")
    write_gpt_oss(folder, layers=2, hidden=192, intermediate=192, experts=8, top_k=4)
    return folder
