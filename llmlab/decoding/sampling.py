"""From logits to the next token."""

from __future__ import annotations

import torch


def next_token_probs(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution that is sampled from: temperature first, then the nucleus (Holtzman et al. 2019, section 3.1).

    The nucleus is the smallest set of most probable tokens whose probabilities add up to `top_p` or more; the rest
    gets probability 0 and the nucleus is renormalized.

    Args:
        logits: [batch, vocabulary], any float dtype.
        temperature: above 0.
        top_p: in (0, 1].

    Returns:
        [batch, vocabulary] fp32, rows sum to 1.
    """
    # From the largest one down: so the lowest temperatures, too, give numbers.
    below = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    probs = (below / max(temperature, 1e-30)).softmax(dim=-1)
    if top_p >= 1:
        return probs
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    before = sorted_probs.cumsum(dim=-1) - sorted_probs  # mass of all more probable tokens
    nucleus = sorted_probs.masked_fill(before >= top_p, 0.0)
    probs = torch.zeros_like(probs).scatter(-1, order, nucleus)
    return probs / probs.sum(dim=-1, keepdim=True)
