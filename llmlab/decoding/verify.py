"""Which drafted tokens are accepted, and which token follows: the heart of speculative decoding, and exact.

Greedy: a drafted token is accepted if it is the argmax, so the ids are those of plain greedy decoding (in fp32; in half
precision a pass over more tokens may round a near-tie the other way). Sampling: a token x drafted from q is accepted
with probability min(1, p(x) / q(x)), else one is drawn from max(0, p - q), normalized: what comes out is distributed as
p (Leviathan et al. 2022, arXiv 2211.17192, appendix A.1; Chen et al. 2023, arXiv 2302.01318, theorem 1). A draft that
did not sample, such as prompt lookup, has q = 1 on its token: then it is the same to draw x from p and to go on as long
as x was drafted, which works for trees, too.
"""

from __future__ import annotations

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
    for index, token in enumerate(proposal.tokens):
        p, q = _probs(logits[index], sampling), proposal.probs[index]
        if torch.rand((), generator=sampling.generator, device=p.device) * q[token] < p[token]:
            continue
        rest = (p - q).clamp(min=0)
        return list(range(index)), _draw(rest / rest.sum(), sampling)
    return list(range(len(proposal.tokens))), _draw(_probs(logits[len(proposal.tokens)], sampling), sampling)


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
