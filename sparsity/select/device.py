"""The choice of passes: numpy on a CPU, Triton for magnitudes on a GPU, torch for everything else."""

from __future__ import annotations

from collections.abc import Sequence

from sparsity.devices import kernels_for
from sparsity.score import Score, is_magnitude
from sparsity.select.numpy_passes import NumpyPasses
from sparsity.select.passes import Passes
from sparsity.select.torch_passes import TorchPasses
from sparsity.select.triton_passes import TritonPasses
from sparsity.shards import ParameterShard


def passes_for(shards: Sequence[ParameterShard], score: Score) -> Passes:
    """Return the fastest passes that the shards' device has for this score."""
    device = shards[0].values.device
    kernels = kernels_for(device)
    if kernels is not None and is_magnitude(score):
        return TritonPasses(shards, score, kernels)
    if device.type == "cpu":
        return NumpyPasses(shards, score)
    return TorchPasses(shards, score, kernels)
