"""The keys of `python -m launch.plan`, which forecasts a run before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schema.checks import check, check_choice


@dataclass
class PlanConfig:
    """The keys of `python -m launch.plan` in addition to those of the run."""

    series: list[str] = field(default_factory=list)
    """The experiments of the table that is printed if no experiment is named."""
    devices: int = 8
    """Number of GPUs."""
    device: str = "H100"
    """Name of the GPU (H100, H200, A100, ...), whose peak and memory the plan uses."""
    device_memory: str | None = None
    """Memory of one GPU: a number with GB (1e9 bytes) or GiB (2^30 bytes); null takes that of `device`."""
    memory_headroom: float = 0.1
    """Share of the device's memory left free for the CUDA context, NCCL's buffers and fragmentation."""
    mfu: float = 0.4
    """Model FLOPs utilization: the share of the peak that the run's dense arithmetic reaches."""
    peak_tflops: float | None = None
    """Dense bf16 peak of one GPU in 1e12 FLOP/s; null takes that of `device`."""
    format: str = "text"
    """`text`, or `json` for scripts."""
    figure: str | None = "auto"
    """File for the density curve; `auto` writes plan.png for one run and nothing for a table; null never writes one."""

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("text", "json"))
        check(self.devices >= 1, f"devices={self.devices} must be at least 1.")
        check(0 < self.mfu <= 1, f"mfu={self.mfu} is outside (0, 1]: give a share of the peak, 0.4 for 40 %.")
        check(self.peak_tflops is None or self.peak_tflops > 0, f"peak_tflops={self.peak_tflops} must be above 0.")
        check(
            0 <= self.memory_headroom < 1,
            f"memory_headroom={self.memory_headroom} is outside [0, 1): give a share of device_memory, 0.1 for 10 %.",
        )
