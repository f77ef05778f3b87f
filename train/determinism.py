"""A mode in which a GPU computes the same bits every time: when a step is repeated, and when a run is resumed.

A CPU does so anyway. A GPU does not, for three reasons: in the backward pass of SDPA many thread blocks add to the same
gradient in no fixed order, cuBLAS may choose another algorithm on another stream, and inductor chooses the kernel that was
fastest this time.
"""

from __future__ import annotations

import os

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}
"""Variables that cuBLAS, transformers' FlashAttention and inductor read when they start. They ask for one workspace per
stream, the backward pass with a fixed order, and a choice of kernels that does not depend on timings."""


def compute_deterministically() -> None:
    """Make torch compute the same bits in every run on the same machine, or raise at an operation that cannot.

    Call it before the process group and CUDA start: NCCL then also avoids reductions in the network's switches, whose
    order varies. Kernels still run asynchronously, unlike under transformers' `enable_full_determinism`, which makes
    the host wait for each one.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    import torch

    torch.use_deterministic_algorithms(True)
    # New memory need not be filled with NaN: no step reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # cuDNN's attention has no deterministic backward pass here; flash and memory-efficient attention have one.
    torch.backends.cuda.enable_cudnn_sdp(False)
