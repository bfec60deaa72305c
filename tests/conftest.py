"""Settings for all tests; they have to be in place before torch and triton are imported."""

import os

# The suite is many small problems; a test that is about threads asks for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Triton's own interpreter runs the kernels on CPU tensors, so their claims are tested without a GPU too.
    os.environ.setdefault("TRITON_INTERPRET", "1")
