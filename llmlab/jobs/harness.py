"""llmlab as a model of lm-evaluation-harness: its tasks run through shared-prefix scoring, unchanged.

from lm_eval import simple_evaluate
simple_evaluate(model=HarnessLM(llmlab.load("smollm2")), tasks=["hellaswag"])
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)

from llmlab.base.errors import InputError
from llmlab.base.progress import progress
from llmlab.decoding.draft import Draft
from llmlab.decoding.generate import Drafts, as_drafts, decode_settings, writer_for
from llmlab.decoding.plain_engine import Decoder, engine_for
from llmlab.decoding.sampling import Sampling, seeded
from llmlab.jobs.own_draft import named_drafts
from llmlab.model.lm import LM
from llmlab.scoring import shared
from llmlab.scoring.encode import Sequence

# Passes from which lookup is worth its preparation: measuring and recording passes of all widths takes as long as
# some 300 passes, and it saves some 8 % of them on word problems (batch 4, on CPU).
ENOUGH = 3000


class HarnessLM(TemplateLM):  # type: ignore[misc]  # lm_eval is untyped
    """lm-evaluation-harness's `LM` interface over an llmlab model.

    Tokenization and the split between context and continuation are the harness's own; requests with the same context
    become one trie. Contexts that are too long lose their beginning, as in the harness's `HFLM`.

    Args:
        lm: the model.
        max_new_tokens: of a continuation whose task does not say.
        batch_size: requests that are decoded together.
        draft: names as for `llmlab generate --draft`, or what `generate` takes; None for none; "auto" for lookup where
            there is enough to write. The text stays the same, and where guesses do not pay none are verified.
    """

    backend = "causal"

    def __init__(self, lm: LM, *, max_new_tokens: int = 256, batch_size: int = 8, draft: Drafts | str = "auto") -> None:
        super().__init__()
        if lm.tokenizer is None:
            raise InputError(f"{lm.name} has random weights and no tokenizer: the harness needs a real model.")
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}: give a positive number.")
        self.lm, self._tokenizer, self.max_new_tokens = lm, lm.tokenizer, max_new_tokens
        self.batch_size, self.draft = batch_size, draft
        self.settings: dict[str, dict[str, str]] = {}  # kind of request -> how the last such were answered
        # The harness's own rule, for models that state no length too, so that windows are cut where it cuts them.
        self.max_length = min(resolve_max_length(lm.model.config, lm.tokenizer), lm.card.context_length)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises InputError if the tokenizer has none."""
        if self._tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {self.lm.name} has no end token, which this task needs.")
        return int(self._tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one where there is no context: as in `HFLM`, BOS if there is one, else EOS."""
        bos = self._tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless told otherwise; BOS once."""
        return self.lm.input_ids(string, special_tokens=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(log-probability, would greedy decoding write it) of each (strings, context ids, continuation ids).

        Raises InputError for a continuation without a token of its own (see `encode`) or longer than the context.
        """
        questions: dict[tuple[int, ...], int] = {}
        sequences: list[Sequence] = []
        for strings, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(
                    f"the continuation in {str(strings)[:200]} has {len(continuation)} tokens of its own: it must have "
                    f"1 to {self.max_length}, the context of {self.lm.name}."
                )
            ids = (context + continuation)[-self.max_length - 1 :]
            question = questions.setdefault(tuple(context), len(questions))
            sequences.append(Sequence(question, len(sequences), ids, len(ids) - len(continuation)))
        with progress(len(sequences), "scoring", "continuation") as bar:

            def show(finished: list[Sequence], _: list[float]) -> None:
                bar.update(len(finished))

            scores = shared.log_probs(self.lm, sequences, on_batch=show)
        self.settings["loglikelihood"] = scores.settings
        return list(zip(scores.log_probs, scores.greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in disjoint windows of the context's length."""
        pairs, counts = [], []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                self.tok_encode(*request.args),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            of_text = [(request.args, *utils.make_disjoint_window(window)) for window in windows]
            pairs += of_text
            counts.append(len(of_text))
        values = iter(self._loglikelihood_tokens(pairs))
        return [sum(value for value, _ in islice(values, count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, in the order of the requests; rows end as they reach one.

        Requests with the same gen_kwargs are decoded together, longest first. Raises InputError for gen_kwargs that are
        not known here and for settings out of range, before the first request is continued.
        """
        draft = self.draft if isinstance(self.draft, str) else "given"
        self.settings["generate_until"] = {"batch_size": str(self.batch_size), "draft": draft}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        settings = [GenKwargs.parse(requests[numbers[0]].args[1], self) for numbers in groups.values()]
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        if [] in contexts:
            raise InputError(f"request {contexts.index([])} has an empty context: give it at least one token.")
        for numbers in groups.values():  # longest first, groups too: a cache that grows has its passes recorded anew
            numbers.sort(key=lambda number: -len(contexts[number]))
        jobs, texts = zip(groups.values(), settings, strict=True), [""] * len(requests)
        with progress(len(requests), "generating", "request") as bar:
            for numbers, kwargs in sorted(jobs, key=lambda job: -len(contexts[job[0][0]]) - job[1].most):
                for number, text in self._continued(numbers, contexts, kwargs):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
        return texts

    def _continued(self, numbers: list[int], contexts: list[list[int]], kwargs: GenKwargs) -> Iterator[tuple[int, str]]:
        """Number and continuation of requests with the same settings, batch by batch."""
        room = self.max_length - kwargs.most
        if cut := sum(len(contexts[number]) > room for number in numbers):
            warnings.warn(f"{cut} contexts are longer than {room} tokens: they lose their beginning.", stacklevel=3)
        settings = decode_settings(self.lm, kwargs.most, kwargs.sampling, kwargs.stop)
        length = settings.length([contexts[numbers[0]][-room:]])
        enough = self.draft != "auto" or len(numbers) * kwargs.most >= ENOUGH * self.batch_size
        writer = writer_for(self.lm, self.engine, settings, self.drafts if enough else None, length)
        for first in range(0, len(numbers), self.batch_size):
            batch = numbers[first : first + self.batch_size]
            run = writer.run([contexts[number][-room:] for number in batch])
            for number, new in zip(batch, run.ids, strict=True):
                yield number, postprocess_generated_text(self.lm.decode(new), kwargs.stop, None)

    @cached_property
    def engine(self) -> Decoder:
        """What decodes; made when a task first generates."""
        return engine_for(self.lm)

    @cached_property
    def drafts(self) -> list[Draft | LM]:
        """The drafts, asked together, as `generate` does."""
        draft = "lookup" if self.draft == "auto" else self.draft
        return [*(named_drafts(self.lm, draft) if isinstance(draft, str) else as_drafts(self.lm, draft))]


@dataclass(frozen=True)
class GenKwargs:
    """What gen_kwargs ask for: `most` new tokens, stop strings, and how tokens are chosen."""

    most: int
    stop: list[str]
    sampling: Sampling

    @classmethod
    def parse(cls, gen_kwargs: dict[str, object], harness: HarnessLM) -> GenKwargs:
        """Read by the harness's own rules: its names for `max_gen_toks`, and the end token's text as a stop string."""
        names = [option.name for option in fields(Sampling) if option.name != "generator"]
        try:
            options = dict(normalize_gen_kwargs(gen_kwargs, harness.max_new_tokens))
            most, until = options.pop("max_gen_toks"), [text for text in options.pop("until") if text]
            sampled, beams, seed = options.pop("do_sample"), options.pop("num_beams", 1), options.pop("seed", 0)
            if unknown := sorted(options.keys() - names) + ["num_beams"] * (beams != 1):
                known = ", ".join(["until", "max_gen_toks", "do_sample", "seed", *names])
                raise InputError(f"{', '.join(unknown)} is not known; known are {known}")
            bias = {int(token): float(value) for token, value in options.pop("logit_bias", {}).items()}
            sampling = Sampling(**options, logit_bias=bias, generator=seeded(seed))
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"gen_kwargs {gen_kwargs}: {str(error).rstrip('.')}.") from None
        if sampled and not sampling.temperature:
            raise InputError(f"gen_kwargs {gen_kwargs}: sampling needs a temperature above 0.")
        if not 1 <= most < harness.max_length:
            raise InputError(
                f"gen_kwargs ask for {most} new tokens: give 1 to {harness.max_length - 1}, one less than the context "
                f"of {harness.lm.name}."
            )
        sampling.check_vocabulary(harness.lm.card.vocab_size)
        return cls(most, handle_stop_sequences(until, harness.lm.tokenizer.eos_token), sampling)
