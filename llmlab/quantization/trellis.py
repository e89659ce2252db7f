"""A trellis code on Gaussian data (Tseng et al. 2024, QTIP, arXiv 2406.11235): an exhibit that needs no model.

A grid rounds each weight alone: at k bits it has 2^k levels, and no choice of them does better than Lloyd's and Max's.
A trellis code rounds a whole sequence S_1 .. S_T, still at k bits a weight. Each state of L bits stands for a value
C(state), and a weight's k new bits push the oldest k out (the paper's bitshift trellis, section 3.1, with V = 1):

    state_t = 2^k state_{t-1} + b_t  mod 2^L

So 2^L values are in use, every weight has 2^k of them to choose from, and which these are depends on the L - k bits
before it. Decoding reads a window of L bits, anywhere in the string; it needs no table where C is computed (1MAD).
Encoding is the search for the walk through the trellis that comes nearest to S,

    argmin over walks  sum_t (S_t - C(state_t))^2,

which Viterbi's recursion finds, the cost of the best walk that ends in state j after t weights:

    D_t(j) = min over i -> j of D_{t-1}(i)  +  (S_t - C(j))^2

Here a walk starts in state 0, so that k bits a weight are all there is to store. The paper closes the string to a ring
(tail-biting, section 3.2), rounds blocks of rotated weights under the Hessian and takes L = 16; that is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch

from llmlab.base.errors import InputError


def one_mad(states: torch.Tensor) -> torch.Tensor:
    """1MAD (algorithm 1): one multiply-add of the state, and the sum of the result's four bytes, close to N(0, 1)."""
    x = (34038481 * states.long() + 76625530) & 0xFFFFFFFF
    total = sum((x >> shift) & 0xFF for shift in (0, 8, 16, 24))
    return (torch.as_tensor(total) - 510).float() / 147.800537109375


@dataclass(frozen=True)
class Trellis:
    """An (L, k, 1) bitshift trellis with the code 1MAD.

    Attributes:
        k: bits of a weight.
        L: bits of a state, at most 16: time and memory of the search go with 2^L.
    """

    k: int = 2
    L: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 8 or not self.k < self.L <= 16:
            raise InputError(
                f"k = {self.k} bits in states of L = {self.L}: choose k of 1 to 8 and L above it, up to 16."
            )

    @property
    def values(self) -> torch.Tensor:
        """C of every state, fp32 [2^L]."""
        return one_mad(torch.arange(1 << self.L))

    def encode(self, sequences: torch.Tensor) -> torch.Tensor:
        """The bits b_t of the best walk by Viterbi: S [sequences, T] of variance 1 to uint8 [sequences, T] below 2^k.

        Takes 2^(L-k) T + 16 x 2^L bytes a sequence; all sequences are searched at once.
        """
        n, length = sequences.shape
        into, out = 1 << self.k, 1 << (self.L - self.k)  # edges into a state, and groups of states with the same ones
        values = self.values.view(out, into)
        # State i = m 2^(L-k) + r goes to the 2^k states j with j >> k = r: which i was best is kept once for each r.
        costs = torch.full((n, 1 << self.L), math.inf)
        costs[:, 0] = 0
        best = torch.empty(length, n, out, dtype=torch.uint8)
        for t in range(length):
            least, best[t] = costs.view(n, into, out).min(1)
            costs = (least[:, :, None] + (sequences[:, t, None, None] - values).square()).view(n, -1)
        state, rows = costs.argmin(1), torch.arange(n)
        bits = torch.empty(n, length, dtype=torch.uint8)
        for t in reversed(range(length)):
            bits[:, t] = state & (into - 1)
            before = state >> self.k
            state = best[t, rows, before].long() * out + before
        return bits

    def decode(self, bits: torch.Tensor) -> torch.Tensor:
        """C of every state that the bits [sequences, T] walk through, fp32 [sequences, T]."""
        states = torch.zeros_like(bits, dtype=torch.int64)
        length = bits.shape[1]
        for back in range(min(length, -(-self.L // self.k))):  # the state after b_t holds the last L / k symbols
            states[:, back:] |= bits[:, : length - back].long() << (self.k * back)
        return self.values[states & ((1 << self.L) - 1)]


def scalar_error(levels: torch.Tensor) -> float:
    """E (x - nearest level)^2 for x of N(0, 1): levels fp64, rising."""
    means, shares = _cells(levels)
    return float(1 - 2 * (levels * means).sum() + (levels.square() * shares).sum())


def lloyd_max(k: int) -> torch.Tensor:
    """The 2^k levels of least squared error for N(0, 1), fp64: each the mean of what is rounded to it (Max 1960)."""
    levels = torch.linspace(-2, 2, 1 << k, dtype=torch.float64)
    for _ in range(1000):
        means, shares = _cells(levels)
        levels = means / shares
    return levels


def uniform(k: int) -> torch.Tensor:
    """2^k levels at equal distances, the distance of least squared error for N(0, 1) (to 0.005), fp64."""
    steps = torch.arange(1 << k, dtype=torch.float64) - ((1 << k) - 1) / 2
    return min((steps * distance / 200 for distance in range(20, 400)), key=scalar_error)


def _cells(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the numbers that each level is nearest to: the integral of x times N(0, 1)'s density, and of the density."""
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    return density[:-1] - density[1:], torch.special.ndtr(edges).diff()


def gaussian_errors(*, L: int = 12, sequences: int = 16, length: int = 1024, seed: int = 0) -> pd.DataFrame:
    """Mean squared errors for N(0, 1) at 1 to 4 bits: a row a `code` ("uniform", "Lloyd-Max", "trellis", "bound").

    The trellis is measured on `sequences` x `length` samples, the others are exact; the bound is Shannon's, 2^(-2k).
    Columns `code`, `bits`, `mse`; what QTIP published stands in data/published/.
    """
    samples = torch.randn(sequences, length, generator=torch.Generator().manual_seed(seed))
    rows = list[dict[str, object]]()
    for k in (1, 2, 3, 4):
        trellis = Trellis(k, L)
        error = float((samples - trellis.decode(trellis.encode(samples))).square().mean())
        scalar = {"uniform": scalar_error(uniform(k)), "Lloyd-Max": scalar_error(lloyd_max(k))}
        errors = scalar | {"trellis": error, "bound": 4.0**-k}
        rows += [{"code": code, "bits": k, "mse": mse} for code, mse in errors.items()]
    return pd.DataFrame(rows)
