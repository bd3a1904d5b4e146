"""How far a share measured on a finite test set can be trusted.

`wilson` and `difference` speak of the draw of test images only: another seed of the training moves a result too, and only further
runs tell how far. `mean_difference` takes such runs into account.
"""

import math
from collections.abc import Sequence
from statistics import fmean, variance

from scipy.special import stdtrit

Z95 = 1.959963984540054  # normal quantile at 97.5 %


def wilson(share: float, count: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a binomial share (E. B. Wilson, JASA 22, 1927, p. 209); stays within [0, 1], also at 0 and 1.

    Args:
        share: measured, in [0, 1].
        count: images it was measured on, above 0.
        z: normal quantile; the default gives 95 %.
    """
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    middle, scale = share + z**2 / (2 * count), 1 + z**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def difference(ours: float, our_count: int, theirs: float, their_count: int) -> tuple[float, float]:
    """95 % interval of `ours - theirs` (R. G. Newcombe, Statistics in Medicine 17, 1998, p. 873, method 10).

    It takes the two shares as independent. Two models on the same images mostly err on the same ones, so that the true interval
    is narrower than this: what it calls clear is clear.
    """
    (our_low, our_high), (their_low, their_high) = wilson(ours, our_count), wilson(theirs, their_count)
    below = math.hypot(ours - our_low, their_high - theirs)
    above = math.hypot(our_high - ours, theirs - their_low)
    return ours - theirs - below, ours - theirs + above


def mean_difference(ours: Sequence[float], our_count: int, theirs: Sequence[float], their_count: int) -> tuple[float, float]:
    """95 % interval of the difference between the means of two arms' runs, over the draw of test images and over seeds.

    The variances add up: that of `difference` at the means, undivided, since all runs of an arm meet the same images, and that of
    each mean over its runs; a single run tells nothing of the latter. A spread over few runs is itself uncertain, hence Student's t,
    with the degrees of freedom of F. E. Satterthwaite (Biometrics Bulletin 2, 1946, p. 110).
    """
    gap, (low, high) = fmean(ours) - fmean(theirs), difference(fmean(ours), our_count, fmean(theirs), their_count)
    spreads = [(variance(values) / len(values), len(values) - 1) for values in (ours, theirs) if len(values) > 1]
    seeds, images = sum(spread for spread, _ in spreads), ((high - low) / (2 * Z95)) ** 2
    if not seeds:
        return low, high
    freedom = (images + seeds) ** 2 / sum(spread**2 / degrees for spread, degrees in spreads)
    scale, aside = float(stdtrit(freedom, 0.975)) / Z95, Z95 * math.sqrt(seeds)
    return gap - scale * math.hypot(gap - low, aside), gap + scale * math.hypot(high - gap, aside)
