"""Settings for all tests; they have to be in place before torch and triton are imported."""

import os
import signal

# The suite is many small problems; a test that is about threads asks for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton's own interpreter runs the kernels on CPU tensors, so their claims are tested without a GPU too.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# What the runner ignores (`make test &` in a script, nohup), all that the tests start would ignore, too. A handler is
# not handed on to other programs, and one that does nothing lets this process outlive its terminal.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else lambda *_: None)

# No example has a time limit: on a shared machine any of them can be slow.
settings.register_profile("aepo", deadline=None)
settings.load_profile("aepo")


def pytest_configure(config: pytest.Config) -> None:
    # NumPy warns about what the kernels mean to do with infinities; a GPU would not.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
