"""Principal components of cells, also where a covariance matrix would not fit.

Legend: N cells, E values in each, K components, L directions of a sketch.
"""

import torch
from torch import Tensor

EXACT = 2048  # values in a cell up to which the covariance is taken apart: a matrix of 16 MB, some seconds
SPARE, ROUNDS = 16, 6  # directions beyond K, and passes over the cells


def principal_components(x_NE: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (mean_E, orthonormal axes_KE by falling variance), K = min(count, E); of wide cells K is at most N too.

    Beyond EXACT values (13 channels of 32x32 pixels have 13,312, a covariance of 0.7 GB) the axes come from a sketch: subspace
    iteration from random directions that are always the same (Halko et al., arXiv 0909.4061, algorithm 4.4).
    """
    mean_E = x_NE.mean(0)
    centred_NE = x_NE - mean_E
    if x_NE.shape[1] <= EXACT:
        axes_EE = torch.linalg.eigh(centred_NE.T @ centred_NE / len(x_NE)).eigenvectors
        return mean_E, axes_EE.flip(1)[:, :count].T
    return mean_E, _by_sketch(centred_NE, min(count, len(x_NE)))


def _by_sketch(centred_NE: Tensor, count: int) -> Tensor:
    directions = min(count + SPARE, *centred_NE.shape)
    start_EL = torch.randn(centred_NE.shape[1], directions, generator=torch.Generator().manual_seed(0))
    basis_EL = torch.linalg.qr(start_EL.to(centred_NE)).Q
    for _ in range(ROUNDS):
        basis_EL = torch.linalg.qr(centred_NE.T @ (centred_NE @ basis_EL)).Q
    inside_NL = centred_NE @ basis_EL
    turn_LL = torch.linalg.eigh(inside_NL.T @ inside_NL / len(inside_NL)).eigenvectors
    return (basis_EL @ turn_LL.flip(1)[:, :count]).T
