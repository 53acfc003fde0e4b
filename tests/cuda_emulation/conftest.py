"""The built library, once for a session."""

import pytest
from cuda_emulation.emulation import Emulation, build, missing


@pytest.fixture(scope="session", autouse=True)
def _can_run(request):
    if request.config.getoption("--emulate-cuda"):
        pytest.skip("--emulate-cuda has switched the process's operators already")
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def emulation(_can_run):
    return Emulation(build())
