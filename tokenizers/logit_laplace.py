"""The logit-Laplace distribution of pixels (Ramesh et al., arXiv 2102.12092, appendix A.3).

A pixel x in [0, 1] is moved to (1 - 2 eps) x + eps, inside (0, 1), and its logit is Laplace distributed:
f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)). So a decoder's means and scales are free, and all of f lies on (0, 1).
"""

import math

from torch import Tensor

EPS = 0.1


def map_pixels(x: Tensor) -> Tensor:
    """[0, 1] to [eps, 1 - eps], where logits are moderate."""
    return (1 - 2 * EPS) * x + EPS


def unmap_pixels(x: Tensor) -> Tensor:
    """The inverse, clamped to [0, 1]."""
    return ((x - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def negative_log_likelihood(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """-log f(x | mu, b) in nats, value by value, of x in (0, 1)."""
    return (x.logit() - mu).abs() * (-log_b).exp() + log_b + math.log(2) + (x * (1 - x)).log()
