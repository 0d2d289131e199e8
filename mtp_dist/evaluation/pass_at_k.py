"""The probability that one of k samples solves a problem (Chen et al. 2021, arXiv:2107.03374, section 2.1)."""

from math import comb


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate for a problem: 1 - C(n - c, k) / C(n, k) for n >= k samples, of which c are correct.

    This is the fraction of the subsets of k samples that contain a correct one.
    """
    return 1 - comb(samples - correct, k) / comb(samples, k)
