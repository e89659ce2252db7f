"""PlainEngine: transformers' own forward pass and cache, row by row, for models that the static cache does not serve.

Such as models without attention (Mamba, RWKV), with attention of their own (Falcon), or of both kinds (Jamba).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator

import torch

from llmlab.base.errors import InputError
from llmlab.decoding.engine import Engine, NotServed
from llmlab.kernels.replay import sharded
from llmlab.model.lm import LM
from llmlab.model.selfcheck import check, plain_logits, probe

STATES = ("past_key_values", "cache_params", "state")  # what transformers' models call what they keep of the past


class PlainEngine:
    """A model that reads each row by transformers' forward pass: exact for every model, and without drafts.

    Where its cache does not give the numbers of a whole pass either, each token costs a pass over the whole sequence.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.cached = True
        self.last_only = "logits_to_keep" in inspect.signature(lm.model.forward).parameters
        self.cached = check(lm, "transformers' cache", self._stepped, lambda: self._known(plain_logits(lm))).passed
        self.start(0, 0)

    @property
    def kind(self) -> str:
        """What it keeps of the past."""
        return "transformers' cache, row by row" if self.cached else "no cache, row by row"

    def start(self, batch: int, capacity: int) -> None:
        """`batch` empty rows; they grow as they must."""
        del capacity
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        self.states: list[dict[str, object]] = [{} for _ in range(batch)]

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Read the prompts; logits [batch, vocabulary] that follow each prompt's last token."""
        return torch.stack([self._read(row, ids) for row, ids in enumerate(prompts)])

    def forward(self, tokens: list[list[int]], parents: list[list[int]] | None = None) -> torch.Tensor:
        """Read a token of each row; logits [batch, 1, vocabulary]."""
        assert parents is None and all(len(ids) == 1 for ids in tokens), "drafted tokens, but it takes none"
        return self.prefill(tokens)[:, None]

    def keep(self, kept: list[list[int]]) -> None:
        """All that was read is kept."""

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.ids, self.states = [self.ids[row] for row in rows], [self.states[row] for row in rows]

    def seconds(self, width: int, batch: int | None = None) -> float:
        """Raises InputError, see `profile`."""
        return self.profile()[width]

    def profile(self) -> dict[int, float]:
        """Raises InputError: only drafts ask what passes cost."""
        raise InputError(f"{self.lm.name} decodes with {self.kind}: it takes no drafts.")

    def observe(self, width: int, seconds: float) -> None:
        """Nobody asks."""

    def agreed(self, seconds: float) -> float:
        """There are no ranks."""
        return seconds

    @property
    def seconds_recording(self) -> float:
        """Nothing is recorded."""
        return 0.0

    def tensors(self) -> Iterator[torch.Tensor]:
        """The model's; what it keeps of the past is left out."""
        yield from self.lm.model.parameters()
        yield from self.lm.model.buffers()

    @torch.inference_mode()
    def _read(self, row: int, ids: list[int]) -> torch.Tensor:
        """Logits [vocabulary] behind the last of these tokens, which follow those of the row."""
        self.ids[row] = self.ids[row] + ids
        given = ids if self.states[row] else self.ids[row]
        last = {"logits_to_keep": 1} if self.last_only else {}
        output = self.lm.model(
            input_ids=torch.tensor([given], device=self.lm.device), use_cache=self.cached, **self.states[row], **last
        )
        if self.cached:
            self.states[row] = {name: output[name] for name in STATES if output.get(name) is not None}
            if not self.states[row]:
                raise InputError("it keeps nothing of the past.")
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _stepped(self) -> torch.Tensor:
        """Logits of the second half of the probe's rows, token by token."""
        rows = probe(self.lm)
        self.start(len(rows), 0)
        logits = []
        for row, ids in enumerate(rows):
            half = len(ids) // 2
            logits += [self._read(row, ids[:half]), *(self._read(row, [token]) for token in ids[half:])]
        return torch.stack(logits)

    def _known(self, logits: torch.Tensor) -> torch.Tensor:
        """The same of the plain pass's logits."""
        rows = torch.split(logits, [len(ids) for ids in probe(self.lm)])
        return torch.cat([of_row[len(of_row) // 2 - 1 :] for of_row in rows])


Decoder = Engine | PlainEngine


def engine_for(lm: LM) -> Decoder:
    """The fastest engine that is exact for this model; warns if that is transformers' own passes.

    Raises `NotServed` on ranks, which have no other.
    """
    try:
        return Engine(lm)
    except NotServed as reason:
        if sharded(lm.model):
            raise
        plain = PlainEngine(lm)
        warnings.warn(f"{str(reason).rstrip('.')}; so it decodes with {plain.kind}, and no drafts.", stacklevel=3)
        return plain
