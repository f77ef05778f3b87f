"""The peak rates of GPUs by name. A run's FLOP/s are given as a share of them. Plans use this, so it imports no torch."""

from __future__ import annotations

import re
from typing import Literal

Precision = Literal["bf16", "fp8"]

PEAK_TFLOPS: dict[str, dict[Precision, float]] = {
    "h100 pcie": {"bf16": 756.5, "fp8": 1513.0},
    "h100 nvl": {"bf16": 835.5, "fp8": 1670.5},
    "h100": {"bf16": 989.5, "fp8": 1979.0},
    "h200 nvl": {"bf16": 835.5, "fp8": 1670.5},
    "h200": {"bf16": 989.5, "fp8": 1979.0},
    "gh200": {"bf16": 989.5, "fp8": 1979.0},
    "h800": {"bf16": 989.5, "fp8": 1979.0},
    "h20": {"bf16": 148.0, "fp8": 296.0},
    "b200": {"bf16": 2250.0, "fp8": 4500.0},
    "b300": {"bf16": 2250.0, "fp8": 4500.0},
    "gb200": {"bf16": 2500.0, "fp8": 5000.0},
    "gb300": {"bf16": 2500.0, "fp8": 5000.0},
    "a100": {"bf16": 312.0},
    "a800": {"bf16": 312.0},
    "a30": {"bf16": 165.0},
    "a40": {"bf16": 149.7},
    "a10": {"bf16": 125.0},
    "rtx a6000": {"bf16": 154.8},
    "rtx 6000 ada": {"bf16": 364.2, "fp8": 728.5},
    "l40s": {"bf16": 362.0, "fp8": 733.0},
    "l40": {"bf16": 181.0, "fp8": 362.0},
    "l4": {"bf16": 121.0, "fp8": 242.5},
    "rtx 3090": {"bf16": 71.0},
    "rtx 4090": {"bf16": 165.2, "fp8": 330.3},
    "rtx 5090": {"bf16": 209.5, "fp8": 419.0},
}
"""1e12 FLOP/s of dense matrix products that accumulate in float32, from the vendor's data sheets; their figures "with
sparsity" are twice as large. The first key whose words are all in the device's name applies. fp16 has bf16's peak."""

_SLICES_AND_VARIANTS = {"mig", "grid", "laptop", "mobile", "d"}
"""Words that make a name mean a slower device than the one of the table that it resembles."""


def peak_tflops(name: str, precision: Precision = "bf16") -> float | None:
    """Return a GPU's dense peak in 1e12 FLOP/s.

    Args:
        name: The name from `torch.cuda.get_device_name`, "NVIDIA H100 80GB HBM3", or a key of `PEAK_TFLOPS` in any
            case.
        precision: The precision of the matrix products.

    Returns:
        The peak; None for a device that is not in the table or that has no unit for this precision.
    """
    words = set(re.split(r"[^a-z0-9.]+", name.lower()))
    if words & _SLICES_AND_VARIANTS:
        return None
    for key, peaks in PEAK_TFLOPS.items():
        if set(key.split()) <= words:
            return peaks.get(precision)
    return None
