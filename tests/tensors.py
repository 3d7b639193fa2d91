"""Small tensors, written down and compared, for the tests of the formulae."""

import torch
from torch import Tensor


def close(found: Tensor, expected, tolerance: float = 1e-6) -> bool:
    """Whether shape and numbers are those expected; NaN is NaN."""
    expected = torch.as_tensor(expected, dtype=found.dtype)
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=0, atol=tolerance, equal_nan=True
    )


def column(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
