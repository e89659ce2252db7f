"""What generate() returns: completions, where the time went, what speculation did."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmlab.base.stats import Metric
from llmlab.decoding.cost import Tally
from llmlab.decoding.loop import Step


@dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    `ids` are without the end token; `stopped` tells whether an end token or a stop string ended it; `steps` what each
    pass drafted and what was accepted.
    """

    prompt: str
    text: str
    ids: list[int]
    stopped: bool
    steps: list[Step] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class GenerateResult:
    """Completions of N prompts and where the time went.

    Attributes:
        completions: in the order of the prompts.
        prompt_tokens: tokens of all prompts.
        new_tokens: tokens produced, counted from ids; end tokens count, tokens after them do not.
        decoded_tokens: those of them that decode steps produced; prefill produced the first one of each prompt.
        seconds_prefill: all prefills; each also yields the first token.
        seconds_decode: all decode steps.
        seconds_first_token: median over batches of the time from prompt to first token.
        seconds_warmup: measuring, recording and compiling passes; not in the other times but the total.
        draft: what drafted tokens; empty for plain decoding.
        speculation: what was drafted and accepted, and what the cost model says; None for plain decoding.
        cache: what kept the past: the static KV cache, or transformers' own where that is not exact for the model.
        sampling: what is set of `Sampling` beside temperature and nucleus.
        max_new_tokens, k: as `generate` was told.
        token_ids: a fingerprint of the prompts', the chat template's and special ones included.
        memory_bytes: what the engine and its drafts held: weights, copies of them in other layouts, caches.
    """

    completions: list[Completion]
    prompt_tokens: int
    new_tokens: int
    decoded_tokens: int
    seconds_prefill: float
    seconds_decode: float
    seconds_first_token: float
    temperature: float
    top_p: float
    seed: int
    batch_size: int = 1
    seconds_warmup: float = 0.0
    seconds_total: float = 0.0
    draft: str = ""
    speculation: Tally | None = None
    cache: str = "static KV cache"
    memory_bytes: int | None = None
    sampling: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int = 0
    k: int | None = None
    token_ids: str = ""
    task: str = "generate"
    data: str = "prompts"

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.completions)

    @property
    def texts(self) -> list[str]:
        """The completions' texts."""
        return [c.text for c in self.completions]

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens from decode steps over their time, all rows of a batch together (0 if there was no step)."""
        return self.decoded_tokens / self.seconds_decode if self.decoded_tokens else 0.0

    @property
    def settings(self) -> dict[str, str]:
        """How it was decoded: runs that differ in them do not measure the same."""
        return {
            "temperature": f"{self.temperature:g}",
            "top_p": f"{self.top_p:g}",
            "batch_size": str(self.batch_size),
            "draft": self.draft,
            "k": ("adaptive" if self.k is None else str(self.k)) if self.draft else "",
            "max_new_tokens": str(self.max_new_tokens),
            "token_ids": self.token_ids,
        } | self.sampling

    @property
    def protocol(self) -> str:
        """How the numbers came about, in one line."""
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature}, top-p {self.top_p}"
        how += "".join(f", {name} {value}" for name, value in self.sampling.items())
        drafting = f", draft: {self.draft}" if self.draft else ""
        return f"{how}, batch size {self.batch_size}, {self.cache}{drafting}, tokens counted from ids"

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units, for a Record."""
        metrics = {
            "decode_tokens_per_second": Metric(self.decode_tokens_per_second, "token/s"),
            "prefill_tokens_per_second": Metric(self.prompt_tokens / self.seconds_prefill, "token/s"),
            "seconds_first_token": Metric(self.seconds_first_token, "s"),
            "seconds_warmup": Metric(self.seconds_warmup, "s"),
            "seconds_total": Metric(self.seconds_total, "s"),
            "new_tokens": Metric(self.new_tokens, "token"),
        }
        if self.speculation:
            metrics |= self.speculation.metrics()
        return metrics

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        told = ("task", "n", "prompt_tokens", "seconds_prefill", "seconds_decode", "protocol")
        completions = [
            {"prompt": c.prompt, "text": c.text, "ids": c.ids, "stopped": c.stopped} for c in self.completions
        ]
        return {
            **{name: getattr(self, name) for name in told},
            **{name: metric.value for name, metric in self.metrics().items()},
            "completions": completions,
        }
