"""Which drafted tokens are accepted, and which token follows: the heart of speculative decoding, and exact.

Greedy: a drafted token is accepted if it is the argmax, so the ids are those of plain greedy decoding (in fp32; in half
precision a pass over more tokens may round a near-tie the other way).

Sampling, one token: x drafted from q is accepted with probability min(1, p(x) / q(x)), else one is drawn from
max(0, p - q), normalized: what comes out is distributed as p (Leviathan et al. 2022, arXiv 2211.17192, appendix A.1;
Chen et al. 2023, arXiv 2302.01318, theorem 1). A chain: to accept token by token so keeps p, too, but throws away that
a token with p > q makes up for one with p < q before it. Block verification (Sun et al. 2024, arXiv 2403.10444,
algorithm 2) decides on all of them together, and no rule that keeps p accepts more (theorem 2 there); see `_block`.

A draft that did not sample, such as prompt lookup, has q = 1 on its token: then it is the same to draw x from p and to
go on as long as x was drafted, which works for trees, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from llmlab.decoding.draft import Proposal, Sampling


def verify(
    proposal: Proposal, logits: torch.Tensor, sampling: Sampling, best: list[int] | None = None
) -> tuple[list[int], int]:
    """Which drafted tokens are accepted and which token follows.

    Args:
        proposal: of one row.
        logits: [1 + drafted, vocabulary]: behind the row's last token, then behind each drafted one; with the bias and
            penalties of `sampling`, if it has any (see `Sampling.adjusted`).
        sampling: temperature 0 is greedy.
        best: the argmax of each row of logits where it is known already.

    Returns:
        Indices of accepted drafted tokens, from the root downwards; the token that the model adds.
    """
    if sampling.temperature == 0:
        chosen = logits.argmax(dim=-1).tolist() if best is None else best
        return _follow(proposal, lambda node: chosen[node + 1])
    if proposal.probs is None:
        return _follow(proposal, lambda node: _draw(_probs(logits[node + 1], sampling), sampling))
    return _block(proposal.tokens, proposal.probs, sampling.probs(logits), sampling)


def _block(tokens: list[int], q: torch.Tensor, p: torch.Tensor, sampling: Sampling) -> tuple[list[int], int]:
    """Block verification of a chain x_1 .. x_n drawn from q_1 .. q_n; p_1 .. p_n+1 are the model's distributions.

    w_i = min(1, w_i-1 p_i(x_i) / q_i(x_i)), w_0 = 1, is how much of the model's probability of x_1 .. x_i the draft
    covered. With the part s_i = sum_x max(0, w_i p_i+1(x) - q_i+1(x)) that it will not cover one token further, the
    first i tokens are good enough with probability h_i = s_i / (s_i + 1 - w_i), h_n = w_n. The longest of those that
    are is accepted, and the next token drawn from the part that was not covered.
    """
    n = len(tokens)
    index = torch.tensor(tokens, dtype=torch.long, device=p.device)[:, None]
    ratios = (p[:n].gather(1, index) / q.gather(1, index)).squeeze(1).tolist()
    covered = list(itertools.accumulate(ratios, lambda w, ratio: min(1.0, w * ratio), initial=1.0))  # w_0 .. w_n
    missed = (torch.tensor(covered[:n], device=p.device)[:, None] * p[:n] - q).clamp(min=0)  # [n, vocabulary]
    sums = missed.sum(dim=-1).tolist()
    enough = [s / (s + 1 - w) if s > 0 else 0.0 for s, w in zip(sums[1:], covered[1:n], strict=True)] + covered[n:]
    drawn = torch.rand(n, generator=sampling.generator, device=p.device).tolist()
    accepted = max((i for i in range(1, n + 1) if drawn[i - 1] < enough[i - 1]), default=0)
    rest = p[n] if accepted == n else missed[accepted] / sums[accepted]
    return list(range(accepted)), _draw(rest, sampling)


def _follow(proposal: Proposal, choose: Callable[[int], int]) -> tuple[list[int], int]:
    """Go down the tree as long as what the model chooses was drafted."""
    children, path, node = proposal.children, list[int](), -1
    while (node, token := choose(node)) in children:
        node = children[node, token]
        path.append(node)
    return path, token


def _probs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    return sampling.probs(logits[None])[0]


def _draw(probs: torch.Tensor, sampling: Sampling) -> int:
    return int(torch.multinomial(probs, 1, generator=sampling.generator))
