"""What the tests of both engines share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Models as small as these are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
