"""The forecast of a run before it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schema.checks import check, check_choice


@dataclass
class PlanConfig:
    """Keys of `python -m launch.plan` beside those of the run."""

    series: list[str] = field(default_factory=list)
    """The experiments of the table that is printed if no experiment is named."""
    devices: int = 8
    device: str = "H100"
    """The GPU by name (H100, H200, A100, ...), whose peak and memory the plan counts with."""
    device_memory: str | None = None
    """Memory of one GPU: a number with GB (1e9 bytes) or GiB (2^30 bytes); null takes the device's."""
    memory_headroom: float = 0.1
    """Share of the device's memory left free for the CUDA context, NCCL's buffers and fragmentation."""
    mfu: float = 0.4
    """Model FLOPs utilization: the share of the peak that the run's dense arithmetic reaches."""
    peak_tflops: float | None = None
    """Dense bf16 peak of one GPU in 1e12 FLOP/s; null takes the device's."""
    format: str = "text"
    figure: str | None = "auto"
    """File of the density curve; `auto` writes plan.png here for one run and nothing for a table, null never writes."""

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("text", "json"))
        check(self.devices >= 1, f"devices={self.devices} must be at least 1.")
        check(0 < self.mfu <= 1, f"mfu={self.mfu} is outside (0, 1]: give a share of the peak, 0.4 for 40 %.")
        check(self.peak_tflops is None or self.peak_tflops > 0, f"peak_tflops={self.peak_tflops} must be above 0.")
        check(
            0 <= self.memory_headroom < 1,
            f"memory_headroom={self.memory_headroom} is outside [0, 1): give a share of device_memory, 0.1 for 10 %.",
        )
