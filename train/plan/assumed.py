"""The peak and memory that a plan assumes for one GPU: those given, or those of its name."""

from __future__ import annotations

from conf.schema import PlanConfig
from train.plan.devices import PEAK_TFLOPS, peak_tflops

MEMORY = {
    "h100 nvl": "94GB", "h100": "80GB", "h200": "141GB", "gh200": "96GB", "h800": "80GB", "h20": "96GB", "b200": "180GB",
    "b300": "288GB", "gb200": "186GB", "gb300": "288GB", "a100": "80GB", "a800": "80GB", "a30": "24GB", "a40": "48GB",
    "a10": "24GB", "rtx a6000": "48GB", "rtx 6000 ada": "48GB", "l40s": "48GB", "l40": "48GB", "l4": "24GB",
    "rtx 3090": "24GB", "rtx 4090": "24GB", "rtx 5090": "32GB",
}  # fmt: skip
"""Memory by the words of a device's name; the first key whose words are all in the name applies. It is the largest memory
with which the device is sold, except that an A100 has 80 GB here."""


def peak_of(request: PlanConfig) -> float:
    """Return the dense bf16 peak in 1e12 FLOP/s that the plan uses.

    Raises:
        ValueError: The device is not in the table, and peak_tflops is not given.
    """
    peak = request.peak_tflops or peak_tflops(request.device)
    if peak is None:
        raise ValueError(_unknown(request.device, "peak_tflops=NUMBER, its dense bf16 peak in 1e12 FLOP/s"))
    return peak


def memory_of(request: PlanConfig) -> str:
    """Return the memory of one GPU.

    Raises:
        ValueError: The device is not in the table, and device_memory is not given.
    """
    words = set(request.device.lower().split())
    memory = request.device_memory or next((size for key, size in MEMORY.items() if set(key.split()) <= words), None)
    if memory is None:
        raise ValueError(_unknown(request.device, "device_memory=SIZE, such as 80GB"))
    return memory


def _unknown(device: str, remedy: str) -> str:
    names = ", ".join(name.upper() for name in PEAK_TFLOPS)
    return f"device={device} is not in the table of GPUs: choose one of {names}, or give {remedy}."
