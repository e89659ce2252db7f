"""How far a model's next-token distributions are from another's: what perplexity, one token's mean, does not show."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmlab.model.lm import LM


@dataclass(frozen=True)
class Divergence:
    """Of a model against an exact one, over all positions of some windows.

    Attributes:
        kl: mean of KL(exact || model) = sum over the vocabulary of p (log p - log q), in nats.
        kl_99: its 99 % quantile: what the worst positions lose.
        top1: share of positions where both hold the same token for the most probable.
    """

    kl: float
    kl_99: float
    top1: float


class Exact:
    """The exact model's distributions, kept so that many models can be held against them.

    Takes 4 bytes x tokens x vocabulary on the model's device.

    Args:
        lm: the exact model.
        windows: token ids [windows, tokens].
    """

    def __init__(self, lm: LM, windows: torch.Tensor) -> None:
        self.windows = windows
        self.log_probs = [_log_probs(lm, window) for window in windows]

    def against(self, lm: LM) -> Divergence:
        """The divergence of a model with the same vocabulary."""
        divergences, agreements = [], []
        for window, exact in zip(self.windows, self.log_probs, strict=True):
            log_probs = _log_probs(lm, window)
            divergences.append((exact.exp() * (exact - log_probs)).sum(-1))
            agreements.append(exact.argmax(-1) == log_probs.argmax(-1))
        kl, same = torch.cat(divergences), torch.cat(agreements)
        return Divergence(float(kl.mean()), float(kl.quantile(0.99)), float(same.float().mean()))


@torch.inference_mode()
def _log_probs(lm: LM, window: torch.Tensor) -> torch.Tensor:
    """log p of the next token at each position: [tokens] ids to fp32 [tokens, vocabulary]."""
    logits: torch.Tensor = lm.model(input_ids=window[None].to(lm.device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
