"""The table of peak rates: names as drivers give them, and names that must not be taken for a whole device."""

from __future__ import annotations

import subprocess
import sys

import pytest

from train.plan.devices import peak_tflops


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 1979.0),
        ("NVIDIA H100 PCIe", 756.5, 1513.0),
        ("NVIDIA H100 NVL", 835.5, 1670.5),
        ("NVIDIA H200", 989.5, 1979.0),
        ("NVIDIA H200 NVL", 835.5, 1670.5),
        ("NVIDIA GH200 480GB", 989.5, 1979.0),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, None),
        ("NVIDIA A100 80GB PCIe", 312.0, None),
        ("NVIDIA L40S", 362.0, 733.0),
        ("NVIDIA L4", 121.0, 242.5),
        ("NVIDIA GeForce RTX 4090", 165.2, 330.3),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 728.5),
        ("NVIDIA RTX A6000", 154.8, None),
        ("h100 pcie", 756.5, 1513.0),
    ],
)
def test_a_device_has_its_dense_peak_by_its_drivers_name(name: str, bf16: float, fp8: float | None) -> None:
    assert peak_tflops(name, "bf16") == bf16
    assert peak_tflops(name, "fp8") == fp8


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "GRID A100-10C",
        "Tesla T4",
        "cpu",
        "",
    ],
)
def test_a_slice_a_weaker_variant_and_an_unknown_device_have_no_peak(name: str) -> None:
    assert peak_tflops(name) is None


def test_the_table_needs_no_torch() -> None:
    code = "import sys, train.plan.devices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
