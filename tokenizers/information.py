"""What tokens tell, in bits: entropy by position, of neighbours about each other, and how far surroundings give a token away.

Nothing here is V x V: pairs are counted as they occur, so a codebook of 8192 takes no more memory than its tokens do.

Legend: N images, P Q cells, V codebook size, M pairs.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mimetic.tokenizers.usage import count_codes

SHUFFLES = 4
PRIOR = 4.0  # observations that the overall shares of codes are worth beside the followers of one code


class Neighbours(NamedTuple):
    """Mutual information of neighbouring tokens, in bits.

    Attributes:
        plain: the plug-in estimate, which is far too high where V**2 is more than the number of pairs.
        shuffled: the same of pairs put together at random, which truly is 0.
    """

    plain: float
    shuffled: float

    @property
    def excess(self) -> float:
        """What the tokens tell of each other beyond chance."""
        return self.plain - self.shuffled


class Guess(NamedTuple):
    """A token before and after one looks at its neighbours, on images that the guess was not learned from; entropies in bits.

    Attributes:
        alone: cross-entropy of guessing by the shares of codes alone.
        surrounded: cross-entropy given the neighbours on its four sides.
    """

    alone: float
    surrounded: float

    @property
    def share(self) -> float:
        """Of a token's information, the part that its surroundings give away; 0 where they mislead."""
        return max(0.0, 1 - self.surrounded / self.alone) if self.alone > 0 else 0.0


def entropy_bits(counts: Tensor) -> Tensor:
    """Return the entropies (...) in bits of histograms (..., V)."""
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1) / math.log(2)


def position_entropy(ids_NPQ: Tensor) -> Tensor:
    """Return bits_PQ: the entropy over images of the token at each place; at most log2(N)."""
    images, rows, columns = ids_NPQ.shape
    cells_ON = rearrange(ids_NPQ, "N P Q -> (P Q) N").sort(1).values
    starts_ON = torch.ones_like(cells_ON, dtype=torch.bool)
    starts_ON[:, 1:] = cells_ON[:, 1:] != cells_ON[:, :-1]
    run_M = (starts_ON.flatten().cumsum(0) - 1).unique_consecutive(return_counts=True)[1].double()  # lengths of equal ids in a row
    owner_M = torch.arange(rows * columns, device=ids_NPQ.device).repeat_interleave(starts_ON.sum(1))
    bits_O = torch.zeros(rows * columns, dtype=torch.float64, device=ids_NPQ.device)
    bits_O.index_add_(0, owner_M, torch.special.entr(run_M / images) / math.log(2))
    return bits_O.view(rows, columns)


def position_information(ids_NPQ: Tensor, seed: int = 0) -> float:
    """Return the bits that a token's place tells of it: mean entropy by position with all cells shuffled, less that as they are.

    Near the token's whole entropy, tokens hang on where a cell is, and not on what it shows.
    """
    order = torch.randperm(ids_NPQ.numel(), generator=torch.Generator().manual_seed(seed)).to(ids_NPQ.device)
    shuffled_NPQ = ids_NPQ.flatten()[order].view_as(ids_NPQ)
    return max(0.0, float(position_entropy(shuffled_NPQ).mean() - position_entropy(ids_NPQ).mean()))


def neighbour_information(ids_NPQ: Tensor, vocab_size: int, dim: int, seed: int = 0) -> Neighbours:
    """Return what neighbours along `dim` (1 below each other, 2 beside each other) tell of each other.

    Both sides keep their counts under the shuffles, so the two estimates differ in their joint entropy alone: little variance,
    and four shuffles do. The shuffled estimate has more bias than the plain one, unless tokens are independent: the excess is
    never too high, and too low where pairs are few.
    """
    one_M, other_M = _beside(ids_NPQ, dim)
    marginals = entropy_bits(count_codes(one_M, vocab_size)) + entropy_bits(count_codes(other_M, vocab_size))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(one_M), generator=generator).to(one_M.device) for _ in range(SHUFFLES)]
    shuffled = torch.stack([_joint_bits(one_M[order], other_M, vocab_size) for order in orders]).mean()
    return Neighbours(float(marginals - _joint_bits(one_M, other_M, vocab_size)), float(marginals - shuffled))


def guess_from_surroundings(ids_NPQ: Tensor, vocab_size: int) -> Guess:
    """Return how far a token is given away by its neighbours: learned on one half of the images, measured on the other.

    For each side, the shares of codes that follow a neighbour, smoothed by the shares of all codes (a Dirichlet prior); the mean
    over the sides is the guess. Measured on other images it cannot flatter: what few pairs do not show, it does not find. A
    network that sees more finds more.
    """
    learned_NPQ, asked_NPQ = ids_NPQ[::2], ids_NPQ[1::2]
    share_V = (count_codes(learned_NPQ, vocab_size) + 0.5).double()
    share_V = share_V / share_V.sum()
    sums, sides = torch.zeros(2, asked_NPQ.numel(), dtype=torch.float64, device=ids_NPQ.device)
    places = torch.arange(asked_NPQ.numel(), device=ids_NPQ.device).view_as(asked_NPQ)
    for dim in (1, 2):
        if ids_NPQ.shape[dim] < 2:
            continue
        learned, asked, where = (_beside(grid, dim) for grid in (learned_NPQ, asked_NPQ, places))
        for given, told in ((0, 1), (1, 0)):
            sums[where[told]] += _followers(learned[given], learned[told], asked[given], asked[told], share_V)
            sides[where[told]] += 1
    alone_M = share_V[asked_NPQ.flatten()]
    guess_M = torch.where(sides > 0, sums / sides.clamp(min=1), alone_M)
    return Guess(*(float(-chance_M.log2().mean()) for chance_M in (alone_M, guess_M)))


def _beside(grid_NPQ: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(M,) and (M,): every cell that has a neighbour after it, and that one."""
    length = grid_NPQ.shape[dim] - 1
    return grid_NPQ.narrow(dim, 0, length).reshape(-1), grid_NPQ.narrow(dim, 1, length).reshape(-1)


def _joint_bits(one_M: Tensor, other_M: Tensor, vocab_size: int) -> Tensor:
    return entropy_bits((one_M * vocab_size + other_M).unique(return_counts=True)[1])


def _followers(given_L: Tensor, told_L: Tensor, given_M: Tensor, told_M: Tensor, share_V: Tensor) -> Tensor:
    """The chance_M of `told_M` beside `given_M`, learned from the L pairs."""
    vocab_size = len(share_V)
    pairs, counts = (given_L * vocab_size + told_L).unique(return_counts=True)
    asked_M = given_M * vocab_size + told_M
    place_M = torch.searchsorted(pairs, asked_M).clamp(max=len(pairs) - 1)
    together_M = torch.where(pairs[place_M] == asked_M, counts[place_M], 0)
    return (together_M + PRIOR * share_V[told_M]) / (count_codes(given_L, vocab_size)[given_M] + PRIOR)
