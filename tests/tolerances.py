"""How exact results must be, by dtype, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


#: Largest error of values, relative to the largest entry of what is expected.
VALUES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
    torch.complex128: 1e-12,
    torch.complex64: 2e-6,
    torch.int64: 0.0,
}

#: Largest relative error of a meta-gradient in float64 against central differences.
META_GRADIENT = 1e-6

#: Tolerances of ``gradcheck`` and ``gradgradcheck`` in float64.
GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference over the largest expected entry; ``inf`` if it is ``nan``."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    if actual.numel() == 0:
        return 0.0
    wide = torch.complex128 if actual.is_complex() or expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    if difference != difference:
        return float("inf")
    return 0.0 if difference == 0 else difference / scale if scale else float("inf")


def close(actual: Any, expected: Any, dtype: torch.dtype | None = None, times: float = 1.0) -> bool:
    """Whether values agree to the tolerance of ``dtype`` (of ``expected``) times a factor."""
    dtype = dtype or torch.as_tensor(expected).dtype
    return relative_error(actual, expected) <= VALUES[dtype] * times


def assert_close(
    actual: Any, expected: Any, dtype: torch.dtype | None = None, times: float = 1.0, what: str = ""
) -> None:
    """Assert that tensors, or sequences or dicts of them or ``None``, agree to that of a dtype."""
    if expected is None:
        assert actual is None, f"{what}: {actual} instead of None"
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{what}: {set(actual)} instead of {set(expected)}"
        for key in expected:
            assert_close(actual[key], expected[key], dtype, times, f"{what}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{what}: {len(actual)} instead of {len(expected)}"
        for index, (a, e) in enumerate(zip(actual, expected)):
            assert_close(a, e, dtype, times, f"{what}[{index}]")
    else:
        bound = VALUES[dtype or torch.as_tensor(expected).dtype] * times
        error = relative_error(actual, expected)
        assert error <= bound, (
            f"{what} differs by {error:.3g} > {bound:.3g}:\n{actual}\ninstead of\n{expected}"
        )


def all_finite(*tensors: Tensor) -> bool:
    """Whether no entry is infinite or ``nan``."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
