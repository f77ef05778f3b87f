"""A mode in which a GPU computes the same bits again: the same step twice, and a resumed run as the whole one.

A CPU does so anyway. On a GPU the backward of SDPA adds to one gradient from many thread blocks at once, in an order of
their own, cuBLAS may pick another algorithm on another stream, and inductor picks what was fastest this time.
"""

from __future__ import annotations

import os

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}
"""What cuBLAS, transformers' FlashAttention and inductor read when they start: one workspace for each stream, the ordered
backward, and no choice between kernels by how fast they ran this time."""


def compute_deterministically() -> None:
    """Have torch compute the same bits in every run on the same machine, or raise at an operation that can't.

    Call it before the process group and CUDA start: NCCL, too, is then kept from reductions in the network's switches,
    whose order varies. Kernels still run asynchronously, unlike under transformers' `enable_full_determinism`, which
    makes the host wait for each one.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    import torch

    torch.use_deterministic_algorithms(True)
    # New memory need not be filled with NaN: no step reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # The backward of cuDNN's attention has no deterministic form here; flash and memory-efficient attention have one.
    torch.backends.cuda.enable_cudnn_sdp(False)
