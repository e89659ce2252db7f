"""From logits to the next token: bias and penalties, temperature, top-k, nucleus, min-p, in transformers' order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from llmlab.base.errors import InputError

LARGEST = 1e6  # of a penalty or a bias: beyond it fp32 logits would not stay finite


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen behind a row of tokens. The same rule serves plain decoding and verification of drafts.

    Attributes:
        temperature: 0 is greedy: the most probable token, after bias and penalties.
        top_p: nucleus of the samples, in (0, 1].
        generator: of the samples.
        top_k: sample from the k most probable tokens; 0 for all.
        min_p: sample from tokens at least this share as probable as the most probable one, in [0, 1].
        repetition_penalty: divides positive logits of tokens that stand in the prompt or the output, and multiplies
            negative ones (Keskar et al. 2019, arXiv 1909.05858, section 4.1; transformers' rule). 1 changes nothing.
        presence_penalty: taken from the logits of tokens that stand in the output; the prompt does not count (the rule
            of OpenAI's interface and of vLLM).
        frequency_penalty: the same, for each time that they stand there.
        logit_bias: added to the logits of these ids, before the penalties.

    Raises InputError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        presence, frequency = self.presence_penalty, self.frequency_penalty
        far = next((token for token, bias in self.logit_bias.items() if not abs(bias) <= LARGEST), None)
        complaints = {
            f"temperature {self.temperature}: give 0 (greedy) or more.": not 0 <= self.temperature < math.inf,
            f"top-p {self.top_p}: give a number above 0 and at most 1.": not 0 < self.top_p <= 1,
            f"top-k {self.top_k}: give a whole number; 0 takes all tokens.": (
                not isinstance(self.top_k, int) or self.top_k < 0
            ),
            f"min-p {self.min_p}: give a number from 0 to 1.": not 0 <= self.min_p <= 1,
            f"repetition penalty {self.repetition_penalty}: give a number above 0; 1 changes nothing.": (
                not 1 / LARGEST <= self.repetition_penalty <= LARGEST
            ),
            f"presence penalty {presence}: give a number; 0 changes nothing.": not abs(presence) <= LARGEST,
            f"frequency penalty {frequency}: give a number; 0 changes nothing.": not abs(frequency) <= LARGEST,
            f"bias {self.logit_bias.get(far or 0)} of token {far}: give a number up to {LARGEST:g}.": far is not None,
        }
        for complaint, holds in complaints.items():
            if holds:
                raise InputError(complaint)

    @property
    def non_default(self) -> dict[str, str]:
        """What is set beside temperature and nucleus, by name; nothing by default, so that records stay comparable."""
        options = [(option.name, getattr(self, option.name)) for option in fields(self)[3:]]
        return {name: str(value) for name, value in options if value != getattr(Sampling(), name)}

    @property
    def adjusts(self) -> bool:
        """Whether there is a bias or a penalty: logits then depend on more than the model."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or any(penalties)

    def check_vocabulary(self, size: int) -> None:
        """Raise InputError for the bias of a token that a model of `size` tokens does not have."""
        if (beyond := next((token for token in self.logit_bias if not 0 <= token < size), None)) is not None:
            raise InputError(f"bias of token {beyond}: the model has tokens 0 to {size - 1}.")

    def adjusted(
        self, logits: torch.Tensor, prompt: Sequence[int], new: Sequence[int], paths: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Logits with bias and penalties.

        Args:
            logits: [positions, vocabulary], any float dtype.
            prompt: token ids of the row.
            new: those of its output.
            paths: for each position the drafted tokens between `new` and it (see `Proposal.paths`), which count as
                output: what is accepted must have been judged as plain decoding judges it.

        Returns:
            [positions, vocabulary], fp32.
        """
        logits, device = logits.float().clone(), logits.device
        if self.logit_bias:
            logits[:, list(self.logit_bias)] += logits.new_tensor(list(self.logit_bias.values()))
        counts = torch.zeros_like(logits)  # of each token in the output
        for count, path in zip(counts, paths, strict=True):
            ids = torch.tensor([*new, *path], dtype=torch.long, device=device)
            count.scatter_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))
        written = counts > 0
        seen = written.index_fill(1, torch.tensor(prompt, dtype=torch.long, device=device), True)
        penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
        return logits - self.frequency_penalty * counts - self.presence_penalty * written

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that is sampled from: of adjusted logits [batch, vocabulary]; see `next_token_probs`."""
        return next_token_probs(logits, self.temperature, self.top_p, self.top_k, self.min_p)


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of samples. Raises InputError for a seed that is none."""
    if not isinstance(seed, int):
        raise InputError(f"seed {seed!r}: give a whole number.")
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"seed {seed}: give a number of 64 bits.")
    return torch.Generator(device=device).manual_seed(seed)


def next_token_probs(
    logits: torch.Tensor, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0
) -> torch.Tensor:
    """The distribution that is sampled from: temperature, the k most probable tokens, the nucleus, then min-p.

    The nucleus is the smallest set of most probable tokens whose probabilities, renormalized over those k, add up to
    `top_p` or more (Holtzman et al. 2019, arXiv 1904.09751, section 3.1); min-p keeps what is at least `min_p` times as
    probable as the most probable token (Nguyen et al. 2024, arXiv 2407.01082). The rest gets probability 0.

    Args:
        logits: [batch, vocabulary], any float dtype.
        temperature: above 0.
        top_p: in (0, 1].
        top_k: 0 for all. Tokens as probable as the k-th stay, too.
        min_p: in [0, 1].

    Returns:
        [batch, vocabulary] fp32, rows sum to 1.
    """
    # From the largest one down: so the lowest temperatures, too, give numbers.
    below = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    if 0 < top_k < logits.shape[-1]:
        below = below.masked_fill(below < below.topk(top_k).values[..., -1:], float("-inf"))
    probs = (below / max(temperature, 1e-30)).softmax(dim=-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        before = sorted_probs.cumsum(dim=-1) - sorted_probs  # mass of all more probable tokens
        nucleus = sorted_probs.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, nucleus)
    probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0) if min_p else probs
    return probs / probs.sum(dim=-1, keepdim=True) if top_p < 1 or min_p else probs
