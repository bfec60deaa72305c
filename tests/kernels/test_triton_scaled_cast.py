"""Claims about Triton's scaled_cast in place. (What every backend must do is tested in test_linear_precision.py.)"""

import pytest
import torch

pytest.importorskip("triton")

from aepo_kernels.kernels.scaled_cast import TILE, TILES, scaled_cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("numel", [1, TILE, TILES * TILE + 3])
def test_in_place_by_one_nothing_is_touched(numel):
    signalling = torch.full((numel,), 0x7F800001, dtype=torch.int32, device=DEVICE)  # a product would make it quiet
    x = signalling.view(torch.float32).clone()
    scaled_cast(x, torch.ones((), device=DEVICE), x)
    assert torch.equal(x.view(torch.int32), signalling)
    out = torch.zeros_like(x)
    scaled_cast(x, torch.ones((), device=DEVICE), out)  # elsewhere it has to be written
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, torch.nan])
def test_in_place_by_another_factor(factor, dtype):
    x = torch.randn(TILES * TILE + 3, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    expected = x * factor  # powers of two: exact
    scaled_cast(x, torch.tensor(factor, device=DEVICE), x)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
