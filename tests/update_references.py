"""Plain one-process references of the updates, written from the papers: whole tensors, sorts and loops."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from tests.update_runs import CASES, END, EVERY, NUM_STEPS, OPTIONS, SHAPES, SHARE, Tensors, batch, loss_of, make_model

# --- the papers' way: whole tensors, sorts and loops ---


class Reference:
    """A reference: dense weights and masks in one process. `moved` holds how many weights each move replaced."""

    def __init__(self, case: str) -> None:
        self.schedule, self.update, self.scope = CASES[case]
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in make_model().named_parameters()}
        self.masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), **OPTIONS)
        self.history: list[tuple[Tensors, Tensors]] = []
        self.densities: list[float] = []

    def train(self) -> None:
        for step in range(NUM_STEPS):
            self.before(step)
            self.densities.append(
                sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())
            )
            used = {n: (w * self.masks[n]).detach().requires_grad_() for n, w in self.weights.items()}
            loss = loss_of(lambda x, u=used: (x @ u["0.weight"].T).tanh() @ u["2.weight"].T, batch(step))
            gradients = dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))
            self.learn(step, gradients)
            self.history.append(
                (
                    {n: m.clone() for n, m in self.masks.items()},
                    {n: (w * self.masks[n]).detach() for n, w in self.weights.items()},
                )
            )

    def before(self, step: int) -> None:
        raise NotImplementedError

    def learn(self, step: int, gradients: Tensors) -> None:
        """Make a masked update: pruned weights have no gradient, and stay 0 with moments of 0."""
        for name, weight in self.weights.items():
            weight.grad = gradients[name] * self.masks[name]
        self.optimizer.step()
        self.clean()

    def clean(self) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight[~self.masks[name]] = 0
                for state in self.optimizer.state.get(weight, {}).values():
                    if state.shape == weight.shape:
                        state[~self.masks[name]] = 0

    def pools(self) -> list[list[str]]:
        return [list(SHAPES)] if self.scope == "global" else [[name] for name in SHAPES]

    def num_pruned(self, names: list[str], step: int) -> int:
        numel = sum(math.prod(SHAPES[name]) for name in names)
        if self.scope == "erk":
            # 32 of 54 weights are pruned. By (rows + columns) / weights, 11.31 and 10.29 stay, so 18.69 and 13.71 go.
            assert self.schedule.density(step) == pytest.approx(0.4)
            return {"0.weight": 18, "2.weight": 14}[names[0]]
        return round((1 - self.schedule.density(step)) * numel)

    def prune(self, step: int) -> None:
        """Mark the smallest of each pool as pruned; those pruned before come first."""
        for names in self.pools():
            values = torch.cat(
                [torch.where(self.masks[n], self.weights[n].detach().abs(), -1.0).view(-1) for n in names]
            )
            kept = torch.ones(len(values), dtype=torch.bool)
            kept[values.sort(stable=True).indices[: self.num_pruned(names, step)]] = False
            self.write(names, kept)

    def write(self, names: list[str], kept: Tensor) -> None:
        for name, part in zip(names, kept.split([math.prod(SHAPES[n]) for n in names]), strict=True):
            self.masks[name] = part.view(SHAPES[name]).clone()

    def share(self, step: int) -> float:
        return SHARE / 2 * (1 + math.cos(math.pi * step / (END * NUM_STEPS)))

    def is_move(self, step: int) -> bool:
        return step % EVERY == 0 and min(self.schedule.events()) < step < END * NUM_STEPS

    def move(self, step: int, growth: Tensors) -> None:
        """Drop the smallest weights, then grow those inactive weights for which `growth` is largest."""
        for names in self.pools():
            kept = torch.cat([self.masks[n].view(-1) for n in names])
            size = torch.cat([self.weights[n].detach().abs().view(-1) for n in names])
            count = int(self.share(step) * int(kept.sum()))
            drop = torch.where(kept, size, torch.inf).sort(stable=True).indices[:count]
            kept[drop] = False
            grows = torch.cat([growth[n].view(-1) for n in names])
            kept[torch.where(kept, -1.0, grows.double()).sort(descending=True).indices[:count]] = True
            self.write(names, kept)
        self.clean()


class RiglReference(Reference):
    """Evci et al. 2020, algorithm 1; with a falling density GraNet (Liu et al. 2021)."""

    def before(self, step: int) -> None:
        if step in self.schedule.events():
            self.prune(step)
            self.clean()

    def learn(self, step: int, gradients: Tensors) -> None:
        if self.is_move(step):
            self.move(step, {name: gradient.abs() for name, gradient in gradients.items()})
        else:
            super().learn(step, gradients)


class SetReference(RiglReference):
    """Mocanu et al. 2018: as many connections as were removed are added at random."""

    def before(self, step: int) -> None:
        super().before(step)
        if self.is_move(step):
            self.move(step, {name: random_order(f"3:{step}:{name}", shape) for name, shape in SHAPES.items()})

    def learn(self, step: int, gradients: Tensors) -> None:
        Reference.learn(self, step, gradients)


class SteReference(Reference):
    """The straight-through estimator: forward with masked weights, the gradient to all of them."""

    def before(self, step: int) -> None:
        if step in self.schedule.events() or self.is_move(step):
            self.masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
            self.prune(step)

    def learn(self, step: int, gradients: Tensors) -> None:
        for name, weight in self.weights.items():
            weight.grad = gradients[name]
        self.optimizer.step()


class AcDcReference(Reference):
    """Peste et al. 2021: compressed phases keep the largest weights, decompressed ones train all."""

    def before(self, step: int) -> None:
        if step in (2, 8):
            self.prune(step)
            self.clean()
        if step == 5:
            self.masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}


def random_order(text: str, shape: tuple[int, int]) -> Tensor:
    """Return SplitMix64 of a counter that begins at a hash, computed with Python's integers."""
    start = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    found = []
    for index in range(math.prod(shape)):
        x = (start + index) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        found.append((x ^ (x >> 31)) >> 33)
    return torch.tensor(found, dtype=torch.float64)


def reference_of(case: str) -> Reference:
    kinds = {
        "set": SetReference,
        "rigl": RiglReference,
        "granet": RiglReference,
        "ste": SteReference,
        "acdc": AcDcReference,
    }
    reference = kinds[case.split(",")[0]](case)
    reference.train()
    return reference


def assert_same(history: list[tuple[Tensors, Tensors]], reference: Reference) -> None:
    for step, ((masks, weights), (right, values)) in enumerate(zip(history, reference.history, strict=True)):
        for name in SHAPES:
            assert torch.equal(masks[name], right[name]), (step, name, masks[name].int(), right[name].int())
            torch.testing.assert_close(weights[name], values[name], rtol=1e-4, atol=1e-5, msg=f"step {step}, {name}")
            assert (weights[name][~masks[name]] == 0).all()
