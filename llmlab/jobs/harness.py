"""llmlab as a model of lm-evaluation-harness: its tasks run through shared-prefix scoring, unchanged.

from lm_eval import simple_evaluate
simple_evaluate(model=HarnessLM(llmlab.load("smollm2")), tasks=["hellaswag"])
"""

from __future__ import annotations

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from llmlab.base.errors import InputError
from llmlab.decoding.generate import generate
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

    @property
    def eot_token_id(self) -> int:
        """The token that stands for an empty context."""
        return int(self._tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one in rolling log-likelihoods: as in `HFLM`, BOS where there is one."""
        bos = self._tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless told otherwise."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self._tokenizer.encode(string, **options))

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(log-probability, would greedy decoding write it) of each (strings, context ids, continuation ids)."""
        questions: dict[tuple[int, ...], int] = {}
        sequences: list[Sequence] = []
        for _strings, context, continuation in requests:
            ids = (context + continuation)[-self.lm.card.context_length - 1 :]
            question = questions.setdefault(tuple(context), len(questions))
            sequences.append(Sequence(question, len(sequences), ids, len(ids) - len(continuation)))
        scores = shared.log_probs(self.lm, sequences)
        return list(zip(scores.log_probs, scores.greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in disjoint windows of the context's length."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.lm.card.context_length,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled continuations up to the first stop string."""
        texts = []
        for request in requests:
            prompt, settings = request.args
            stops = settings.get("until") or []
            text = generate(
                self.lm,
                [prompt],
                max_new_tokens=settings.get("max_gen_toks", self.max_new_tokens),
                temperature=settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0,
                top_p=settings.get("top_p", 1.0),
            ).texts[0]
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts
