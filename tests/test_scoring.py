"""Perplexity and bits per byte, compared with a plain loop over the tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tests.distributed import run_ranks
from train.distributed import World
from train.scoring import Score, score_stream

ALONE = World(0, 1, torch.device("cpu"))


def tiny_model() -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def stream(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, length)


@torch.no_grad()
def by_hand(tokens: np.ndarray, window: int) -> tuple[float, int, float, int]:
    """Return (nats and number of tokens in full windows, nats and number of all tokens except the first), one by one."""
    model, inside, every = tiny_model(), [], []
    for start in range(0, len(tokens) - 1, window):
        ids = torch.from_numpy(tokens[start : start + window + 1])
        log_probs = model(ids[None, :window]).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            nats = -float(log_probs[position - 1, ids[position]])
            every.append(nats)
            if position < window and start + window <= len(tokens):
                inside.append(nats)
    return math.fsum(inside), len(inside), math.fsum(every), len(every)


@pytest.mark.parametrize("length", [9, 40, 41, 42, 47, 48, 8, 2])
def test_the_score_equals_a_loop_over_the_tokens(length):
    tokens = stream(length)
    score = score_stream(tiny_model(), tokens, window=8, batch_size=2, world=ALONE)
    inside, num_inside, every, num_every = by_hand(tokens, 8)
    assert (score.num_window_tokens, score.num_tokens) == (num_inside, num_every)
    assert score.num_windows == length // 8
    assert score.window_nats == pytest.approx(inside, rel=1e-6, abs=1e-9)
    assert score.nats == pytest.approx(every, rel=1e-6)


def test_figures_follow_from_the_nats():
    score = Score(window=8, num_windows=2, num_window_tokens=14, window_nats=28.0, num_tokens=16, nats=32.0)
    assert score.perplexity == pytest.approx(math.exp(2))
    assert score.bits_per_byte(64) == pytest.approx(0.5 / math.log(2))
    assert Score(8, 2, 14, 1e5, 16, 1e5).perplexity == math.inf


def score_on_ranks() -> Score:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return score_stream(tiny_model(), stream(75), window=8, batch_size=2, world=world)


def test_ranks_share_the_windows_and_agree_with_one_process():
    alone = score_stream(tiny_model(), stream(75), window=8, batch_size=2, world=ALONE)
    for score in run_ranks(score_on_ranks, 3):
        assert score.num_windows == alone.num_windows
        assert score.window_nats == pytest.approx(alone.window_nats, rel=1e-6)
        assert score.nats == pytest.approx(alone.nats, rel=1e-6)
