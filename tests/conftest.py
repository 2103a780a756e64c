"""Without a GPU, Triton kernels run in Triton's interpreter; Triton reads this when it is first imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small are slower on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Encoded rows of tests are kept in a folder of their own, also those of the commands they start."""
    before = os.environ.get("FINETUNE_CACHE")
    os.environ["FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("FINETUNE_CACHE")
    if before is not None:
        os.environ["FINETUNE_CACHE"] = before
