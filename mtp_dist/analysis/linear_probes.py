"""Linear classifiers of hidden states, those of all layers fitted together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CLASSES = 1024
"""A classifier of every token of a large vocabulary would take hours, and most tokens are too rare to be learned."""
MAX_SMOOTHING = 0.1
"""Largest part of the tokens that is added to their counts: tokens that the text lacks are not more probable."""
LOGIT_VARIANCE = 10
"""Variance of the logits that the penalty expects."""
EPOCHS = 10
LOGIT_STEP = 0.3
"""Approximate distance that Adam's first steps move a logit; the learning rate falls to 0."""
ROWS_PER_STEP = 256
SEED = 0


class TokenClasses:
    """Classes of tokens: one for each of the most frequent tokens, and one for all others if there are more.

    The others divide the probability of their class by their frequencies.
    """

    def __init__(self, targets: Tensor, vocab_size: int, limit: int = MAX_CLASSES) -> None:
        """Count the targets `[N]`; each token counts one more time, or less so that these add up to MAX_SMOOTHING N."""
        counts = torch.bincount(targets, minlength=vocab_size)
        frequencies = counts + min(1.0, MAX_SMOOTHING * len(targets) / vocab_size)
        frequencies /= frequencies.sum()
        self.tokens = counts.sort(descending=True, stable=True).indices[:limit]
        """`[C]`: the most frequent token of each class."""
        self.of_token = torch.full_like(counts, len(self.tokens) - 1)
        """`[V]`: the class of each token."""
        self.of_token[self.tokens] = torch.arange(len(self.tokens), device=counts.device)
        sums = torch.zeros_like(frequencies[self.tokens]).index_add_(0, self.of_token, frequencies)
        self.log_frequencies = sums.log()
        """`[C]`."""
        self.log_shares = frequencies.log() - self.log_frequencies[self.of_token]
        """`[V]`: logarithm of each token's part of its class."""

    def token_losses(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropies `[L, M]` of targets `[M]` for log-probabilities of classes `[L, M, C]`."""
        wanted = self.of_token[targets].expand(len(log_probs), -1)
        return -log_probs.gather(2, wanted[:, :, None])[:, :, 0] - self.log_shares[targets]

    def best_tokens(self, log_probs: Tensor) -> Tensor:
        """Return the most probable tokens `[L, M]` for log-probabilities of classes `[L, M, C]`."""
        return self.tokens[(log_probs + self.log_shares[self.tokens]).argmax(-1)]


class LinearProbes:
    """Linear classifiers of hidden states, one for each layer.

    They minimize the mean cross-entropy plus D / (2 v N) times the sum of the squared weights, for N rows of D values
    and LOGIT_VARIANCE v: the penalty of weights whose logits have variance v a priori. The objective is convex, and the
    sum of the layers' objectives has the minimum of each, so that one optimizer fits all of them.
    """

    def __init__(
        self, read: Callable[[Tensor], Tensor], targets: Tensor, classes: TokenClasses, on_step: Callable[[], None]
    ) -> None:
        """Fit the states of rows 0 .. N - 1 to targets `[N]`.

        read: returns the states `[L, b, D]` of rows `[b]`, of mean 0 and variance 1 each. on_step: called after each
        of `num_steps`.
        """
        wanted = classes.of_token[targets]
        layers, _, width = read(targets.new_zeros(1)).shape
        self.weight = torch.zeros(layers, width, len(classes.tokens), device=targets.device, requires_grad=True)
        # The start is the unigram distribution, so that states without information are no worse.
        self.bias = classes.log_frequencies.repeat(layers, 1, 1).requires_grad_()
        optimizer = torch.optim.Adam([self.weight, self.bias], LOGIT_STEP / width**0.5)
        steps, penalty = num_steps(len(targets)), width / (2 * LOGIT_VARIANCE * len(targets))
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(targets), generator=generator).to(targets.device).split(ROWS_PER_STEP):
                optimizer.zero_grad()
                logits = torch.baddbmm(self.bias, read(rows), self.weight)
                losses = F.cross_entropy(logits.flatten(0, 1), wanted[rows].repeat(layers), reduction="sum")
                (losses / len(rows) + penalty * self.weight.square().sum()).backward()
                optimizer.step()
                decay.step()
                on_step()

    @torch.no_grad()
    def log_probs(self, states: Tensor) -> Tensor:
        """Return the log-probabilities of the classes `[L, M, C]` for states `[L, M, D]`."""
        return torch.baddbmm(self.bias, states, self.weight).log_softmax(-1)


def num_steps(rows: int) -> int:
    """Return the number of steps that fit as many rows."""
    return EPOCHS * -(-rows // ROWS_PER_STEP)
