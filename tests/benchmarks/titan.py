"""torchtitan's LLaMA, at the benchmark's size and trained as torchtitan trains it, for `tests.benchmarks.throughput`.

It has torchtitan's compiled blocks, FSDP2 units, bf16 compute on float32 master weights, and compiled loss. It needs
torchtitan (written for version 0.3). Data loader, checkpoints and metrics are left out, so that only the step is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

if TYPE_CHECKING:
    from tests.benchmarks.throughput_variants import Workload


def make_step(work: Workload, device: str) -> Callable[[Tensor], Tensor]:
    """Return a function that trains on tokens [batch, length] and returns the loss on the device."""
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder

    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    with torch.device(device):
        model = model_config(work).build()
        model.init_states(buffer_device=torch.device(device))
    for block in model.layers.values():
        block.compile(fullgraph=True)
    mesh = init_device_mesh(device, (1,), mesh_dim_names=("fsdp",))
    apply_fsdp_to_decoder(model, mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32, pp_enabled=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_of = torch.compile(cross_entropy_loss)

    def step(tokens: Tensor) -> Tensor:
        # The last position has no target; torch ignores -100.
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        loss = loss_of(model(tokens), targets) / tokens[:, 1:].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()  # type: ignore[no-any-return]

    return step


def model_config(work: Workload):  # type: ignore[no-untyped-def]
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    init = {"weight": lambda weight: nn.init.normal_(weight, std=0.02)}
    ones = {"weight": nn.init.ones_}

    def norm():  # type: ignore[no-untyped-def]
        return RMSNorm.Config(normalized_shape=work.hidden, param_init=ones)

    rope = ComplexRoPE.Config(dim=work.hidden // work.heads, max_seq_len=work.length, theta=10_000, scaling="none")
    layers = [
        Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=work.hidden, n_heads=work.heads, n_kv_heads=work.heads, wqkv_param_init=init, wo_param_init=init,
                inner_attention=ScaledDotProductAttention.Config(), fuse_qkv=True, rope=rope,
            ),
            feed_forward=make_ffn_config(
                dim=work.hidden, hidden_dim=4 * work.hidden, w1_param_init=init, w2w3_param_init=init
            ),
        )
        for _ in range(work.layers)
    ]  # fmt: skip
    return Llama3Model.Config(
        dim=work.hidden,
        vocab_size=work.vocabulary,
        tok_embeddings=Embedding.Config(num_embeddings=work.vocabulary, embedding_dim=work.hidden, param_init=init),
        norm=norm(),
        lm_head=Linear.Config(in_features=work.hidden, out_features=work.vocabulary, param_init=init),
        layers=layers,
    )
