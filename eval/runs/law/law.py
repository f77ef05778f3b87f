"""The scaling law: L(N, D) = E + A / N^alpha + B / D^beta, Chinchilla's form (arXiv 2203.15556).

L is a loss in nats per token, N a number of linear parameters, D a number of tokens. For sparse runs, the paper that this
project reproduces (arXiv 2501.12486) uses N-bar, the average of the active parameters over the run, as N.

If all runs have the same number of tokens, D is not a variable, and one of two reduced forms is fitted: `n`,
L = E + A / N^alpha, in which E includes D's term; or `power`, L = A / N^alpha, for sizes that are too similar to separate E
from the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from eval.runs.law.lbfgs import Array

Form = Literal["nd", "n", "power"]

FORMULAS: dict[Form, str] = {
    "nd": "L = E + A / N^alpha + B / D^beta",
    "n": "L = E + A / N^alpha",
    "power": "L = A / N^alpha",
}
COEFFICIENTS: dict[Form, tuple[str, ...]] = {
    "nd": ("E", "A", "alpha", "B", "beta"),
    "n": ("E", "A", "alpha"),
    "power": ("A", "alpha"),
}
FLOPS_PER_PARAM_TOKEN = 6
"""The floating-point operations of training for each parameter and token, forward and backward (arXiv 2001.08361)."""


@dataclass(frozen=True)
class Law:
    """One set of coefficients. E, A and B are kept as logarithms e, a, b, because A and B overflow for a steep law."""

    form: Form
    a: float
    alpha: float
    e: float = -math.inf
    b: float = -math.inf
    beta: float = 0.0

    @classmethod
    def of(cls, A: float, alpha: float, E: float = 0.0, B: float = 0.0, beta: float = 0.0) -> Law:
        """Return the law with these coefficients, in the form that has the coefficients that are not 0."""
        form: Form = "nd" if B else "n" if E else "power"
        e, b = (math.log(value) if value else -math.inf for value in (E, B))
        return cls(form, a=math.log(A), alpha=alpha, e=e, b=b, beta=beta)

    @property
    def coefficients(self) -> dict[str, float]:
        """The form's coefficients by name; A is in nats x parameters^alpha, B in nats x tokens^beta, E in nats."""
        with np.errstate(over="ignore"):
            values = {
                "E": np.exp(self.e),
                "A": np.exp(self.a),
                "alpha": self.alpha,
                "B": np.exp(self.b),
                "beta": self.beta,
            }
        return {name: float(values[name]) for name in COEFFICIENTS[self.form]}

    def loss(self, params: ArrayLike, tokens: ArrayLike) -> Array:
        """Return the loss in nats per token at N = `params` and D = `tokens`; only the form `nd` uses D."""
        with np.errstate(over="ignore"):
            size = np.exp(self.a - self.alpha * np.log(np.asarray(params, dtype=float)))
            data = np.exp(self.b - self.beta * np.log(np.asarray(tokens, dtype=float)))
        return np.asarray(math.exp(self.e) + size + data)

    def cheapest(self, target_loss: float) -> tuple[float, float | None]:
        """Return the (N, D) that reach a loss with the least compute, 6 N D; D is None if the form has only N.

        On the curve of that loss, N D is smallest if alpha A / N^alpha = beta B / D^beta.

        Raises:
            ValueError: The law does not reach this loss.
        """
        above = target_loss - math.exp(self.e)
        if above <= 0:
            raise ValueError(
                f"target_loss={target_loss:g} is not above E={math.exp(self.e):.4g}, the loss that this law gives to an "
                "endless model: ask for more."
            )
        if self.alpha <= 0 or (self.form == "nd" and self.beta <= 0):
            raise ValueError(
                f"target_loss={target_loss:g} has no cheapest run, since the fitted loss does not fall with both N and D "
                f"(alpha={self.alpha:.3g}, beta={self.beta:.3g}): fit runs over wider ranges."
            )
        if self.form != "nd":
            return _exp((self.a - math.log(above)) / self.alpha), None
        size, data = above * self.beta / (self.alpha + self.beta), above * self.alpha / (self.alpha + self.beta)
        return _exp((self.a - math.log(size)) / self.alpha), _exp((self.b - math.log(data)) / self.beta)


def _exp(exponent: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(exponent))
