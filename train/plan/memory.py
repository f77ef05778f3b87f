"""Bytes on one GPU in a training step under FSDP2, in closed form.

The state is sharded over the ranks (full sharding, arXiv 1910.02054): weights, gradients and the two AdamW moments in
float32, and a byte of mask for each prunable weight. A step adds the tensors that autograd saves in transformers' LLaMA
and the buffers of FSDP2; comments below give the formulas for the latter. Autograd saves these bytes per token and block,
with h the width, f the MLP's width, kv the width of keys, and c the bytes of a compute element (2 for bf16):

    2 norms:  2 (4 h + c h + c h)   the float32 input, the normalized input, the output
    attention:  c (h + 2 kv) + c h + 4 heads   queries, keys and values; the output; its log-sum-exp (arXiv 2205.14135)
    MLP:  4 c f   gate, its activation, up, their product

A block compiled by torch.compile saves less, since it computes norms and activations again:

    c (4 h + h + 2 kv + h + 3 f) + 4 heads   inputs and outputs of the norms; queries, keys, values; output; gate, up, product

A compiled loss holds only the logits and their gradient, in the compute type. The computed peak differs by less than 5 %
from peaks measured on a CPU in float32 (`tests/benchmarks/memory.py`: 10 M and 50 M parameters, plain and two FSDP2
ranks, with and without accumulation and checkpointing, sparse and dense), and by less than 1 % from those of the compiled
1B in bf16 on an H200 (docs/gpu.md).
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
    """The way in which a step is computed; `fsdp` is False for a plain single process, which gathers nothing."""

    world_size: int
    micro_batch_size: int
    sequence_length: int
    compute_bytes: int = 2
    accumulates: bool = False
    """True if a step has several micro-batches; accelerate then keeps whole, unsharded gradients between them."""
    gradient_checkpointing: bool = False
    compiled: bool = False
    """True if blocks and loss are compiled by torch.compile."""
    fused_loss: bool = False
    """True if the loss is Liger's cross-entropy, which never holds all logits."""
    fsdp: bool = True
    reshard_after_forward: bool = True
    """True if FSDP2 frees gathered weights after a block's forward and gathers them again for its backward."""
    selection_chunk: int = SELECTION_CHUNK
    update_state_bytes: int = 0
    """The bytes per prunable weight that the update of the masks keeps in addition to the mask."""
    update_move_bytes: int = 0
    """The bytes per prunable weight while masks move by the gradients of a step."""
    uses_muon: bool = False
    """True if Muon updates the matrices of the blocks, with one state for each weight instead of two."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens of a micro-batch."""
        return self.micro_batch_size * self.sequence_length


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU.

    The state (weights, moments, masks) is always there. In each phase of a step, `held` are the gradients and activations
    kept from other phases, and `transients` are the phase's own buffers. The peak is that of the phase with the largest
    sum.
    """

    weights: int
    gradients: int
    waiting_gradients: int
    """The bytes of unsharded gradients while micro-batches accumulate."""
    moments: int
    masks: int
    activations: int
    transients: dict[str, int]
    held: dict[str, int]

    @property
    def peak_phase(self) -> str:
        """The phase of a step with the highest sum of held and transient bytes."""
        return max(self.transients, key=lambda phase: self.transients[phase] + self.held[phase])

    @property
    def transient(self) -> int:
        """The bytes of its own buffers in the phase of the peak."""
        return self.transients[self.peak_phase]

    @property
    def peak(self) -> int:
        """The bytes in use at the highest point of a step."""
        state = self.weights + self.moments + self.masks
        return state + self.held[self.peak_phase] + self.transients[self.peak_phase]


def gpu_memory(model: ModelConfig, num_prunable: int, setting: Setting) -> GpuMemory:
    """Return the memory that a run needs on one GPU.

    Args:
        model: The model.
        num_prunable: The number of its prunable weights.
        setting: The way in which a step is computed.
    """
    counts = count_parameters(model)
    world, c, tokens = setting.world_size, setting.compute_bytes, setting.num_tokens
    shard = -(-counts.total // world)
    prunable = -(-num_prunable // world)
    muon = muon_weights(model)
    gradients = FLOAT32_BYTES * shard
    # Under accelerate's no_sync, FSDP2 reduces nothing until the last micro-batch: until then each rank keeps the gradients
    # of the whole model, in the dtype in which they are summed over the ranks.
    waiting = (FLOAT32_BYTES * counts.total if setting.fsdp else gradients) if setting.accumulates else 0
    activations = tokens * activation_bytes_per_token(model, setting)
    one_block = tokens * block_bytes_per_token(model, c, setting.compiled)
    recomputed = one_block if setting.gradient_checkpointing else 0
    workspace = tokens * workspace_bytes_per_token(model, c) + recomputed
    embedding = model.vocab_size * model.hidden_size
    tail = embedding + model.hidden_size
    block = counts.linear_per_layer + 2 * model.hidden_size
    # Gathered weights: the block being computed, the one prefetched, and the buffer that the gather fills; in the backward
    # pass also the block's gradients and the copy of them that is being reduced. Weights kept for the backward pass are
    # all there during the loss and when that pass begins; the embedding's are not needed then but are counted too.
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
    if setting.uses_muon:
        transients["an update by Muon"] = muon_bytes(model.hidden_size, model.intermediate_size)
        held["an update by Muon"] = gradients
    if setting.update_move_bytes:
        transients["a move of the masks"] = selection + setting.update_move_bytes * prunable
        held["a move of the masks"] = gradients
    return GpuMemory(
        weights=FLOAT32_BYTES * shard,
        gradients=gradients,
        waiting_gradients=waiting if setting.fsdp else 0,
        moments=2 * FLOAT32_BYTES * shard - (FLOAT32_BYTES * -(-muon // world) if setting.uses_muon else 0),
        masks=(MASK_BYTES + setting.update_state_bytes) * prunable,
        activations=activations,
        transients=transients,
        held=held,
    )


def muon_weights(model: ModelConfig) -> int:
    """Return the number of weights that Muon updates: the matrices of the blocks."""
    return model.num_hidden_layers * count_parameters(model).linear_per_layer


def muon_bytes(rows: int, columns: int) -> int:
    """Return the bytes of an update of one matrix: its gathered momentum in float32, three bfloat16 copies, two products."""
    return (FLOAT32_BYTES + 3 * 2) * rows * columns + 2 * 2 * min(rows, columns) ** 2


def block_bytes_per_token(model: ModelConfig, c: int, compiled: bool = False) -> int:
    """Return the bytes per token that autograd saves for one decoder block, by the formulas at the top of this file.

    Args:
        model: The model.
        c: The bytes of a compute element.
        compiled: Whether the block is compiled by torch.compile.
    """
    h, f, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    kv = h // heads * model.num_key_value_heads
    if compiled:
        return c * (4 * h + (h + 2 * kv) + h + 3 * f) + FLOAT32_BYTES * heads
    norms = 2 * (FLOAT32_BYTES + 2 * c) * h
    attention = c * (h + 2 * kv) + c * h + FLOAT32_BYTES * heads
    return norms + attention + 4 * c * f


def activation_bytes_per_token(model: ModelConfig, setting: Setting) -> int:
    """Return the bytes that autograd saves for the whole model before the loss; with checkpointing, only block inputs."""
    c = setting.compute_bytes
    block = c * model.hidden_size
    if not setting.gradient_checkpointing:
        block = block_bytes_per_token(model, c, setting.compiled)
    return model.num_hidden_layers * block + (FLOAT32_BYTES + 2 * c) * model.hidden_size


def loss_bytes_per_token(model: ModelConfig, setting: Setting) -> int:
    """Return the bytes per token of logits and cross-entropy.

    The forward pass holds the logits in the compute type, their float32 copy and the log-probabilities. The backward pass
    holds three float32 copies: the log-probabilities and two gradients of them. Liger's fused loss works on chunks of
    tokens, so small that it holds about one model width per token. A compiled loss holds the logits and their gradient in
    the compute type.
    """
    vocabulary = model.vocab_size
    if setting.compiled and not setting.fused_loss:
        return 2 * setting.compute_bytes * vocabulary
    if setting.fused_loss:
        vocabulary = min(vocabulary, model.hidden_size)
    return max(3 * FLOAT32_BYTES, setting.compute_bytes + 2 * FLOAT32_BYTES) * vocabulary


def workspace_bytes_per_token(model: ModelConfig, c: int) -> int:
    """Return the bytes of activation gradients alive at once in a block's backward: three of the MLP's, two residual."""
    return c * (3 * model.intermediate_size + 2 * model.hidden_size)


def largest_micro_batch(
    model: ModelConfig, num_prunable: int, setting: Setting, *, share: int, budget_bytes: float
) -> tuple[int, GpuMemory] | None:
    """Return the largest micro-batch that fits on a GPU, and its memory; None if none fits.

    Args:
        model: The model.
        num_prunable: The number of its prunable weights.
        setting: The way in which a step is computed.
        share: A GPU's share of the batch, in sequences; the micro-batch divides it.
        budget_bytes: The memory that a step may use.
    """
    for size in range(share, 0, -1):
        if share % size:
            continue
        fitted = replace(setting, micro_batch_size=size, accumulates=size < share)
        memory = gpu_memory(model, num_prunable, fitted)
        if memory.peak <= budget_bytes:
            return size, memory
    return None
