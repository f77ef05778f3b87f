"""Bytes on one GPU in a training step under FSDP2, in closed form.

The state is sharded over the ranks (full sharding, arXiv 1910.02054): weights, gradients and the two AdamW moments in
float32, and a byte for each prunable weight's mask. A step adds the tensors that autograd saves in transformers' LLaMA
and the buffers that FSDP2 holds; the formulas for these are given where they are used. With h the width, f the MLP's
width, kv the width of keys, c the bytes of a compute element (2 for bf16), per token and block:

    2 norms:  2 (4 h + c h + c h)   the float32 input, the normalized input, the output
    attention:  c (h + 2 kv) + c h + 4 heads   queries, keys and values; the output; its log-sum-exp (arXiv 2205.14135)
    MLP:  4 c f   gate, its activation, up, their product

A block compiled by torch.compile saves less, since it computes norms and activations again:

    c (4 h + h + 2 kv + h + 3 f) + 4 heads   inputs and outputs of the norms; queries, keys, values; output; gate, up, product

A compiled loss holds only the logits and their gradient, in the compute type. The computed peak is off by less than 5 %
against peaks measured on a CPU in float32 (`tests/benchmarks/memory.py`: 10 M and 50 M parameters, plain and two FSDP2
ranks, with and without accumulation and checkpointing, sparse and dense), and by less than 1 % against those of the
compiled 1B in bf16 on an H200 (docs/gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.schema import ModelConfig
from train.plan.counts import count_parameters

FLOAT32_BYTES = 4
MASK_BYTES = 1
# The number of elements that one pass of the pruning threshold reads on a GPU, and the bytes of its temporaries for
# each: int32 keys, int64 differences and bins, three comparisons (sparsity.select, sparsity.shards.chunks).
SELECTION_CHUNK = 1 << 22
SELECTION_BYTES = 24
# The largest share of weights around the threshold that is collected, and the bytes of each one's key.
CANDIDATE_SHARE = 1 / 32
CANDIDATE_BYTES = 4


@dataclass(frozen=True)
class Setting:
    """The way a step is computed; `fsdp` is False for a plain single process, which gathers nothing."""

    world_size: int
    micro_batch_size: int
    sequence_length: int
    compute_bytes: int = 2
    accumulates: bool = False
    """Several micro-batches per step: accelerate then keeps whole, unsharded gradients between them."""
    gradient_checkpointing: bool = False
    compiled: bool = False
    """Blocks and loss are compiled by torch.compile."""
    fused_loss: bool = False
    """Liger's cross-entropy, which never holds all logits."""
    fsdp: bool = True
    reshard_after_forward: bool = True
    """Whether FSDP2 frees gathered weights after a block's forward and gathers them again for its backward."""
    selection_chunk: int = SELECTION_CHUNK
    update_state_bytes: int = 0
    """Bytes per prunable weight, besides its mask, that the update of the masks keeps."""
    update_move_bytes: int = 0
    """Bytes per prunable weight while masks move by the gradients of a step."""

    @property
    def num_tokens(self) -> int:
        return self.micro_batch_size * self.sequence_length


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU.

    `transients` are the bytes that each phase of a step holds besides the state and `held`, the gradients and
    activations that it keeps. The peak is that of the phase with the largest sum.
    """

    weights: int
    gradients: int
    waiting_gradients: int
    """Bytes of unsharded gradients while micro-batches accumulate."""
    moments: int
    masks: int
    activations: int
    transients: dict[str, int]
    held: dict[str, int]

    @property
    def peak_phase(self) -> str:
        return max(self.transients, key=lambda phase: self.transients[phase] + self.held[phase])

    @property
    def transient(self) -> int:
        """The bytes that the phase of the peak holds for itself alone."""
        return self.transients[self.peak_phase]

    @property
    def peak(self) -> int:
        state = self.weights + self.moments + self.masks
        return state + self.held[self.peak_phase] + self.transients[self.peak_phase]


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory that one rank holds at a time, without those of Python and its libraries.

    Weights are drawn or read one layer at a time (`train.model.weights`); the model is exported one file at a time
    (`train.model.export`).
    """

    layer: int
    """The largest of a block, the embedding and the head, whole and in float32."""
    shard: int
    """The rank's part of the weights; without a GPU it is in host memory too."""
    export: int
    """One file of the exported model, on rank 0 only."""


def host_memory(model: ModelConfig, world_size: int, export_dtype: str, max_shard_size: str) -> HostMemory:
    """Return the host memory of one of `world_size` ranks."""
    counts = count_parameters(model)
    block = counts.linear_per_layer + 2 * model.hidden_size
    exported = counts.total * (2 if export_dtype == "bfloat16" else FLOAT32_BYTES)
    return HostMemory(
        layer=FLOAT32_BYTES * max(block, model.vocab_size * model.hidden_size),
        shard=FLOAT32_BYTES * -(-counts.total // world_size),
        export=min(exported, parse_bytes(max_shard_size)),
    )


def gpu_memory(model: ModelConfig, num_prunable: int, setting: Setting) -> GpuMemory:
    """Return the memory of one of `setting.world_size` GPUs; a world of one holds everything."""
    counts = count_parameters(model)
    world, c, tokens = setting.world_size, setting.compute_bytes, setting.num_tokens
    shard = -(-counts.total // world)
    prunable = -(-num_prunable // world)
    gradients = FLOAT32_BYTES * shard
    # Under accelerate's no_sync, FSDP2 reduces nothing until the last micro-batch: gradients of the whole model wait,
    # in the dtype in which they are summed over the ranks.
    waiting = (FLOAT32_BYTES * counts.total if setting.fsdp else gradients) if setting.accumulates else 0
    activations = tokens * activation_bytes_per_token(model, setting)
    one_block = tokens * block_bytes_per_token(model, c, setting.compiled)
    recomputed = one_block if setting.gradient_checkpointing else 0
    workspace = tokens * workspace_bytes_per_token(model, c) + recomputed
    embedding = model.vocab_size * model.hidden_size
    tail = embedding + model.hidden_size
    block = counts.linear_per_layer + 2 * model.hidden_size
    # Blocks in flight: the one being computed and the one prefetched, plus the buffer that the gather fills; in the
    # backward pass also the block's gradients and the copy of them that is being reduced. Weights kept for the backward
    # pass are all there during the loss and when that pass begins; the embedding's are not needed but are counted too.
    gathered_loss = c * (tail + 2 * block) if setting.fsdp else 0
    gathered_backward = c * (tail + 4 * block) + FLOAT32_BYTES * block if setting.fsdp else 0
    kept = c * counts.total - c * (tail + 2 * block) if setting.fsdp and not setting.reshard_after_forward else 0
    kept = max(0, kept)
    selection = SELECTION_BYTES * min(prunable, setting.selection_chunk) + int(
        CANDIDATE_BYTES * CANDIDATE_SHARE * prunable
    )
    transients = {
        "the loss": tokens * loss_bytes_per_token(model, setting) + gathered_loss + kept,
        "the last block's backward": workspace + gathered_backward + kept,
        "the first block's backward": workspace + (0 if recomputed else one_block) + gathered_backward,
        "a prune event": selection,
    }
    held = {
        "the loss": waiting + activations,
        "the last block's backward": waiting + activations,
        "the first block's backward": gradients + waiting,
        "a prune event": 0,
    }
    if setting.update_move_bytes:
        transients["a move of the masks"] = selection + setting.update_move_bytes * prunable
        held["a move of the masks"] = gradients
    return GpuMemory(
        weights=FLOAT32_BYTES * shard,
        gradients=gradients,
        waiting_gradients=waiting if setting.fsdp else 0,
        moments=2 * FLOAT32_BYTES * shard,
        masks=(MASK_BYTES + setting.update_state_bytes) * prunable,
        activations=activations,
        transients=transients,
        held=held,
    )


def block_bytes_per_token(model: ModelConfig, c: int, compiled: bool = False) -> int:
    """Return the bytes that autograd saves for one decoder block, by the formulas at the top of this file."""
    h, f, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    kv = h // heads * model.num_key_value_heads
    if compiled:
        return c * (4 * h + (h + 2 * kv) + h + 3 * f) + FLOAT32_BYTES * heads
    norms = 2 * (FLOAT32_BYTES + 2 * c) * h
    attention = c * (h + 2 * kv) + c * h + FLOAT32_BYTES * heads
    return norms + attention + 4 * c * f


def activation_bytes_per_token(model: ModelConfig, setting: Setting) -> int:
    """Return the bytes that autograd saves for the whole model before the loss; with checkpointing, each block's input."""
    c = setting.compute_bytes
    block = c * model.hidden_size
    if not setting.gradient_checkpointing:
        block = block_bytes_per_token(model, c, setting.compiled)
    return model.num_hidden_layers * block + (FLOAT32_BYTES + 2 * c) * model.hidden_size


def loss_bytes_per_token(model: ModelConfig, setting: Setting) -> int:
    """Return the bytes of logits and cross-entropy.

    The backward pass holds three float32 copies: the log-probabilities and two gradients of them. The forward pass
    holds the logits in the compute type, their float32 copy and the log-probabilities. Liger's fused loss cuts the
    tokens into as many chunks as the vocabulary is wider than the model, so it holds about one model width per token. A
    compiled loss holds the logits and their gradient in the compute type.
    """
    vocabulary = model.vocab_size
    if setting.compiled and not setting.fused_loss:
        return 2 * setting.compute_bytes * vocabulary
    if setting.fused_loss:
        vocabulary = min(vocabulary, model.hidden_size)
    return max(3 * FLOAT32_BYTES, setting.compute_bytes + 2 * FLOAT32_BYTES) * vocabulary


def workspace_bytes_per_token(model: ModelConfig, c: int) -> int:
    """Return the bytes of activation gradients alive at once in a block's backward: three of the MLP, two residual."""
    return c * (3 * model.intermediate_size + 2 * model.hidden_size)


def largest_micro_batch(
    model: ModelConfig, num_prunable: int, setting: Setting, *, share: int, budget_bytes: float
) -> tuple[int, GpuMemory] | None:
    """Return the largest micro-batch that divides a GPU's `share` of the batch and fits `budget_bytes`, if any."""
    for size in range(share, 0, -1):
        if share % size:
            continue
        fitted = replace(setting, micro_batch_size=size, accumulates=size < share)
        memory = gpu_memory(model, num_prunable, fitted)
        if memory.peak <= budget_bytes:
            return size, memory
    return None


def parse_bytes(text: str) -> int:
    """Return a size in bytes: 141GB as 141e9, 80GiB as 80 x 2^30; a bare number is bytes."""
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "B": 1}
    unit = next((name for name in sorted(units, key=len, reverse=True) if text.strip().endswith(name)), "")
    try:
        size = float(text.strip().removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError(f"device_memory={text} is not an amount of memory: give a number with GB or GiB, like 141GB.")
    return int(size)
