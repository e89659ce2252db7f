"""llmlab as a model of lm-evaluation-harness: its tasks run through shared-prefix scoring, unchanged.

from lm_eval import simple_evaluate
simple_evaluate(model=HarnessLM(llmlab.load("smollm2")), tasks=["hellaswag"])
"""

from __future__ import annotations

from itertools import islice

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import resolve_max_length

from llmlab.base.errors import InputError
from llmlab.decoding.generate import encode_prompts, generate
from llmlab.model.lm import LM
from llmlab.scoring import shared
from llmlab.scoring.encode import Sequence


class HarnessLM(TemplateLM):  # type: ignore[misc]  # lm_eval is untyped
    """lm-evaluation-harness's `LM` interface over an llmlab model.

    Tokenization and the split between context and continuation are the harness's own; requests with the same context
    become one trie. Contexts that are too long lose their beginning, as in the harness's `HFLM`.
    """

    backend = "causal"

    def __init__(self, lm: LM, *, max_new_tokens: int = 256) -> None:
        super().__init__()
        if lm.tokenizer is None:
            raise InputError(f"{lm.name} has random weights and no tokenizer: the harness needs a real model.")
        self.lm, self._tokenizer, self.max_new_tokens = lm, lm.tokenizer, max_new_tokens
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
        scores = shared.log_probs(self.lm, sequences)
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
        """Greedy or sampled continuations up to the first stop string."""
        lengths = [request.args[1].get("max_gen_toks", self.max_new_tokens) for request in requests]
        for request, most in zip(requests, lengths, strict=True):  # refuse a prompt before the first is continued
            encode_prompts(self.lm, [request.args[0]], max_new_tokens=most, chat=False)
        texts = []
        for request, most in zip(requests, lengths, strict=True):
            prompt, settings = request.args
            until = settings.get("until") or []
            result = generate(
                self.lm,
                [prompt],
                max_new_tokens=most,
                temperature=settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0,
                top_p=settings.get("top_p", 1.0),
                stop=[text for text in ([until] if isinstance(until, str) else until) if text],
            )
            texts += result.texts
        return texts
