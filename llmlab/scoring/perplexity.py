"""Perplexity over sliding windows, with the protocol beside the number."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from llmlab.base.errors import InputError, NumericalError
from llmlab.base.progress import progress
from llmlab.base.stats import Z95, Metric
from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.lm import LM


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a text.

    Attributes:
        window_nll: mean negative log-likelihood (nats a token) of the scored tokens of each window.
        window_tokens: how many tokens each window scores.
        context: tokens a window holds; stride: tokens between the starts of two windows.
    """

    window_nll: list[float]
    window_tokens: list[int]
    context: int
    stride: int
    batch_size: int
    seconds_inference: float
    seconds_total: float
    task: str = "perplexity"
    data: str = "text"
    memory_bytes: int | None = None  # the weights alone
    seed: int | None = None  # nothing is drawn

    @property
    def settings(self) -> dict[str, str]:
        """How the text was cut and run."""
        return {name: str(getattr(self, name)) for name in ("context", "stride", "batch_size")}

    @property
    def n(self) -> int:
        """Scored tokens."""
        return sum(self.window_tokens)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a scored token, in nats."""
        return float(np.average(self.window_nll, weights=self.window_tokens))

    @property
    def perplexity(self) -> Metric:
        """exp(nll) with a 95 % interval from the spread between windows (none for a single window)."""
        value = math.exp(self.nll)
        windows = len(self.window_nll)
        if windows < 2:
            return Metric(value)
        half = Z95 * float(np.std(self.window_nll, ddof=1)) / math.sqrt(windows)
        return Metric(value, "", math.exp(self.nll - half), math.exp(self.nll + half))

    @property
    def protocol(self) -> str:
        """How the number came about, in one line: perplexities under other protocols cannot be compared with it."""
        if self.stride == self.context:
            scored = f"non-overlapping, {self.context - 1} tokens of each scored (its first has no context)"
        else:
            scored = f"stride {self.stride}, each window scores its last {self.stride} tokens (the first window all)"
        return (
            f"{len(self.window_nll)} windows of {self.context} tokens, {scored}; {self.n} tokens; log-soft-max in fp32"
        )

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units, for a Record."""
        return {
            "perplexity": self.perplexity,
            "nll": Metric(self.nll, "nat/token"),
            "seconds_inference": Metric(self.seconds_inference, "s"),
            "seconds_total": Metric(self.seconds_total, "s"),
        }

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        ppl = self.perplexity
        values = {"n": self.n, "perplexity": ppl.value, "perplexity_interval": [ppl.low, ppl.high], "nll": self.nll}
        own = {"windows": len(self.window_nll), "settings": self.settings, "protocol": self.protocol}
        return values | asdict(self) | own


def perplexity(
    lm: LM,
    text: str,
    *,
    context: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> PerplexityResult:
    """Perplexity of `text` under the model.

    Windows of `context` tokens start every `stride` tokens; a token is scored once, in the first window that holds it
    with a predecessor. The default, stride = context, is the GPTQ papers' protocol (non-overlapping windows); a
    shorter stride gives each token more context and a lower number. What does not fill a last window is left out
    unless it is the only one.

    Args:
        lm: the model.
        text: long enough for two tokens.
        context: tokens in a window, at most the model's context length.
        stride: 1 .. context.
        max_windows: stop after this many windows.
        batch_size: windows a forward pass.

    Raises:
        InputError: a protocol that makes no sense, or too short a text.
        NumericalError: a window's likelihood is not finite.
    """
    check_protocol(lm, context, stride, max_windows, batch_size)
    stride = context if stride is None else stride
    begin = time.perf_counter()
    ids = torch.tensor(lm.input_ids(text))  # [tokens]
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens: perplexity needs at least two.")
    starts = list(range(0, max(1, len(ids) - context + 1), stride))[:max_windows]
    windows = [ids[start : start + context] for start in starts]
    window_nll: list[float] = []
    window_tokens: list[int] = []
    begin_inference = time.perf_counter()
    with progress(len(windows), "perplexity", "window") as bar, fastest_matmuls(lm.model):
        for first in range(0, len(windows), batch_size):
            batch = torch.stack(windows[first : first + batch_size]).to(lm.device)  # [batch, context]
            for row, nll in enumerate(_token_nll(lm, batch)):
                scored = nll if first + row == 0 or stride == context else nll[-stride:]
                window_nll.append(float(scored.mean()))
                window_tokens.append(scored.numel())
            if not math.isfinite(sum(window_nll)):
                raise NumericalError(
                    f"a window from {first} on has a likelihood that is not finite in {lm.dtype}: try fp32."
                )
            so_far = math.exp(float(np.average(window_nll, weights=window_tokens)))
            bar.set_postfix_str(f"ppl {so_far:.2f}", refresh=False)
            bar.update(len(batch))
    end = time.perf_counter()
    return PerplexityResult(window_nll, window_tokens, context, stride, batch_size, end - begin_inference, end - begin)


@torch.inference_mode()
def _token_nll(lm: LM, batch: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token but the first: [batch, length] ids to [batch, length-1] nats on CPU."""
    logits = lm.model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # [batch, length-1, vocabulary]
    # Flat, so that the vocabulary is the last dimension: over a strided one torch's fp32 sum is off by 1e-4 nats.
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).cpu()


def check_protocol(lm: LM, context: int, stride: int | None, max_windows: int | None, batch_size: int) -> None:
    """Raise InputError for windows that make no sense for this model; needs no weights."""
    stride = context if stride is None else stride
    if not 2 <= context <= lm.card.context_length:
        raise InputError(f"context {context}: choose 2 to {lm.card.context_length} tokens, the context of {lm.name}.")
    if not 1 <= stride <= context:
        raise InputError(f"stride {stride}: choose 1 to {context} tokens, the context.")
    if max_windows is not None and max_windows < 1:
        raise InputError(f"{max_windows} windows: give a positive number, or none for all.")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: give a positive number.")
