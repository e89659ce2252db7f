"""Shared-prefix scoring: one forward pass over a row of tries instead of one sequence per ending. Exact.

    for batch in passes(lm, question_tries(sequences)):           # tries in a row, as many as fill a pass
        totals.add(batch, lm.model(**batch.model).logits)         # adds log p(token) to each sequence it belongs to

Against the plain path it saves the context of three endings in four and the first tokens that endings share, nearly all
padding, and the output head wherever nothing is asked for.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.lm import LM
from llmlab.model.selfcheck import SHARED, Check, check, plain_logits, probe, unrounded
from llmlab.scoring import reference
from llmlab.scoring.attention import Sight, TrieMasks, decoded_once, tries_attend
from llmlab.scoring.encode import Sequence
from llmlab.scoring.one_call import Flex, Slots
from llmlab.scoring.pack import head_rows, profile, take
from llmlab.scoring.scores import OnBatch, Scores, Work, check_finite
from llmlab.scoring.stems import few_shot_tries
from llmlab.scoring.trie import Stem, Trie, build, question_tries

TRIES = "shared-prefix scoring"  # what its self-check is called
FLEX = "FlexAttention over tries"
SOFTMAX_ROWS = {"cpu": 64, "cuda": 1024}  # of logits at once: a few MB in fp32, or enough for a launch to pay


def log_probs(
    lm: LM, sequences: list[Sequence], *, budget: int | None = None, on_batch: OnBatch | None = None
) -> Scores:
    """Score each sequence's ending given its context, in the order given.

    A model for which that is not exact (see `serves`) is scored by the reference path.

    Args:
        lm: the model.
        sequences: from `encode`.
        budget: nodes a forward pass; by default what this device's profile says (see `pack`).
        on_batch: called after each pass with the sequences that it finished and their log-probabilities.

    Raises:
        NumericalError: a log-probability is NaN or infinite; names the batch and the question.
    """
    if not serves(lm, sequences):
        return reference.log_probs(lm, sequences, on_batch=on_batch)
    return in_tries(lm, sequences, budget=budget, on_batch=on_batch)


def in_tries(
    lm: LM, sequences: list[Sequence], *, budget: int | None = None, on_batch: OnBatch | None = None
) -> Scores:
    """The same for a model that is known to be served."""
    with fastest_matmuls(lm.model):
        return score_tries(lm, sequences, few_shot_tries(lm, sequences), budget=budget, on_batch=on_batch)


def serves(lm: LM, sequences: list[Sequence]) -> bool:
    """Whether tries give this model's own numbers (see `trie_check`) for these sequences; warns if not."""
    outcome = trie_check(lm)
    problem = outcome.reason
    if outcome.passed and max(len(s.ids) for s in sequences) > reference.rotary_limit(lm):
        problem = "its rotary frequencies depend on a sequence's length"
    if problem:
        warnings.warn(f"{lm.name} is scored by the reference path: {problem}.", stacklevel=3)
    return not problem


def trie_check(lm: LM) -> Check:
    """Tries of the probe in a row, and its rows on a stem, against the plain forward pass.

    Where GPUs are, a model on CPU is checked with their slots, too: a small copy speaks for the ranks that work there.
    """
    return _check(lm, TRIES, sight_of(lm), *([Slots] if lm.device.type == "cpu" and torch.cuda.is_available() else []))


def sight_of(lm: LM) -> type[Sight]:
    """How attention takes the tries: one by one on CPU, in one call a layer elsewhere, by FlexAttention if that serves.

    FlexAttention has a self-check of its own. For a model that ranks share it is what they were told.
    """
    if lm.device.type == "cpu":
        return TrieMasks
    flexible = lm.device.type == "cuda" and torch.cuda.get_device_capability(lm.device) >= (8, 0)
    return Flex if flexible and _check(lm, FLEX, Flex).passed else Slots


def _check(lm: LM, path: str, *sights: type[Sight]) -> Check:
    short, long = sorted(probe(lm), key=len)
    # Every position is asked for: the whole row is an ending, but for its first token, or for the stem.
    sequences = [Sequence(*at, [*ids, 0], 1) for at, ids in (((0, 0), short), ((1, 0), long), ((1, 1), short))]
    stem = Stem(long[:SHARED])
    on_stem = [build([Sequence(n, 0, [*ids, 0], SHARED + 1)], [n], stem=stem) for n, ids in enumerate((long, short))]

    def in_order(sight: type[Sight]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        with tries_attend(lm), fastest_matmuls(lm.model):
            for tries, order in ((question_tries(sequences), (1, 2, 0)), ([stem.trie()], ()), (on_stem, (0, 1))):
                batch = in_a_row(lm, tries, sight)
                logits = torch.cat(list(_logits(lm, batch, rows=len(long))))
                numbers = torch.tensor([number for _, _, number in batch.scored])
                found += [logits[batch.rows[numbers == number].to(logits.device)] for number in order]
        return torch.cat(found)

    def plain() -> torch.Tensor:
        logits = plain_logits(lm)
        rows = logits[: len(long)], logits[len(long) :]
        return torch.cat([logits, rows[1], *(row[SHARED:] for row in rows)] * len(sights))

    with unrounded(lm.model):
        return check(lm, path, lambda: torch.cat([in_order(sight) for sight in sights]), plain)


@torch.inference_mode()
def score_tries(
    lm: LM,
    sequences: list[Sequence],
    tries: list[Trie],
    *,
    budget: int | None = None,
    head_everywhere: bool = False,
    on_batch: OnBatch | None = None,
) -> Scores:
    """The same with given tries; `head_everywhere` as in `passes`."""
    totals = Totals(sequences, lm.dtype)
    with tries_attend(lm):
        for batch in passes(lm, tries, budget, head_everywhere=head_everywhere):
            finished = totals.add(batch, _logits(lm, batch, head_rows(lm.device, lm.card.vocab_size)))
            if on_batch:
                on_batch(*finished)
    padding = totals.padding / (totals.nodes + totals.padding)
    work = Work(totals.nodes, totals.passes, totals.asked, padding)
    return Scores(totals.log_probs, work, totals.greedy, {"method": "shared"})


@dataclass(frozen=True)
class Batch:
    """Tries in a row: what one forward pass asks the model.

    Attributes:
        model: keyword arguments of the model's forward pass.
        scored: (node, token, sequence) triples: log p(token) at that node is a term of that sequence's sum.
        rows: [triples], which row of the logits belongs to each; on CPU, so that to sort them waits for no GPU.
        targets: [triples], the tokens.
        padding: places of the row that are computed for nothing.
    """

    model: dict[str, Any]
    scored: list[tuple[int, int, int]]
    rows: torch.Tensor
    targets: torch.Tensor
    padding: int = 0

    @property
    def nodes(self) -> int:
        """Tokens that go through the model."""
        return int(self.model["input_ids"].shape[1]) - self.padding


def passes(lm: LM, tries: list[Trie], budget: int | None = None, *, head_everywhere: bool = False) -> Iterator[Batch]:
    """Tries in forward passes, the longest first, those of a stem behind its own pass; to be run within `tries_attend`.

    Args:
        lm: the model.
        tries: from `question_tries` or `few_shot_tries`; a pass must have been run before the next one is asked for.
        budget: nodes a pass; by default what this device's profile says, which learns from the time until the next
            pass is asked for.
        head_everywhere: let the output head work at every node, as a plain forward pass does: for the ablation.
    """
    measured, sight = profile(lm), sight_of(lm)
    by_stem: dict[Stem | None, list[Trie]] = {}
    for trie in sorted(tries, key=len):
        by_stem.setdefault(trie.stem, []).append(trie)
    for stem, waiting in by_stem.items():
        if stem:
            yield in_a_row(lm, [stem.trie()], sight)
        while waiting:
            limit = budget or measured.budget()
            begin = time.perf_counter()
            batch = in_a_row(lm, take(waiting, limit, sight), sight, head_everywhere)
            yield batch
            if budget is None and not stem:  # behind a stem attention costs more: another profile
                measured.observe(limit, batch.nodes, time.perf_counter() - begin)
        if stem:
            stem.layers.clear()


def in_a_row(lm: LM, tries: list[Trie], sight: type[Sight], head_everywhere: bool = False) -> Batch:
    """The tensors of one pass, on the model's device."""
    places = sight.places([len(trie) for trie in tries])
    total, device = places[-1], lm.device
    ids, depths = [0] * total, [0] * total
    scored: list[tuple[int, int, int]] = []
    for trie, start in zip(tries, places, strict=False):
        ids[start : start + len(trie)], depths[start : start + len(trie)] = trie.ids, trie.depths
        scored.extend((start + node, token, sequence) for node, token, sequence in trie.scored)
    asking = torch.tensor([node for node, _, _ in scored], dtype=torch.long)
    nodes, rows = torch.unique(asking, return_inverse=True)  # [asked], [triples]
    if not scored:  # a stem; heads need not take an input without rows
        nodes = torch.tensor([total - 1])
    if head_everywhere:
        nodes, rows = torch.arange(total), asking
    model = {
        "input_ids": torch.tensor([ids], device=device),  # [1, places]
        "position_ids": torch.tensor([depths], device=device),
        # Nothing is masked. Without it transformers would take depths that begin anew for separate sequences.
        "attention_mask": torch.ones(1, total, dtype=torch.long, device=device),
        "sight": sight(tries, lm.model.dtype, device),
        "use_cache": False,
        "logits_to_keep": nodes.to(device),  # the output head works only where a token is asked for
    }
    targets = torch.tensor([token for _, token, _ in scored], dtype=torch.long, device=device)
    return Batch(model, scored, rows, targets, total - sum(map(len, tries)))


def _logits(lm: LM, batch: Batch, rows: int) -> Iterator[torch.Tensor]:
    """A pass's logits [at most `rows`, vocabulary], part by part: the output head's memory limits no pass."""
    with decoded_once(lm.model):
        for few in batch.model["logits_to_keep"].split(rows):
            yield lm.model(**batch.model | {"logits_to_keep": few}).logits[0]


class Totals:
    """Scores of sequences, added up token by token as passes come in.

    Attributes:
        log_probs: the sum so far of each sequence's ending, in nats.
        greedy: whether every token so far is the one that greedy decoding would write.
        nodes, passes, asked: what has been computed for it, as in `Work`; padding: places beside it.
    """

    def __init__(self, sequences: list[Sequence], dtype: str) -> None:
        self.sequences, self.dtype = sequences, dtype
        self.log_probs, self.greedy = [0.0] * len(sequences), [True] * len(sequences)
        self.nodes = self.passes = self.asked = self.padding = 0

    def add(self, batch: Batch, logits: Iterable[torch.Tensor]) -> tuple[list[Sequence], list[float]]:
        """Take in a pass's logits, parts of [asked, vocabulary].

        Returns the sequences that are finished now, and their log-probabilities: as no trie is split over passes, all
        that the pass touches.

        Raises:
            NumericalError: a sum is NaN or infinite; names the pass and the question.
        """
        log_probs, greedy = _terms(batch, logits)
        for (_, _, number), value, best in zip(batch.scored, log_probs, greedy, strict=True):
            self.log_probs[number] += value
            self.greedy[number] &= best
        finished = sorted({number for _, _, number in batch.scored})
        ended, sums = [self.sequences[n] for n in finished], [self.log_probs[n] for n in finished]
        check_finite(ended, sums, self.passes, self.dtype)
        self.nodes, self.padding, self.passes = self.nodes + batch.nodes, self.padding + batch.padding, self.passes + 1
        self.asked += len(batch.model["logits_to_keep"])
        return ended, sums


def _terms(batch: Batch, logits: Iterable[torch.Tensor]) -> tuple[list[float], list[bool]]:
    """Of each triple log p(token), and whether that token is the most probable one."""
    device, first = batch.targets.device, 0
    terms = torch.empty(2, len(batch.rows), device=device)  # read at once: a pass waits for a GPU once
    values, greedy = terms
    # Soft-max in fp32 over a few rows at a time. As log_softmax, not logsumexp: torch's CPU kernels differ by 1e-5 nats
    # a token, and the reference path and lm-evaluation-harness use this one.
    for few in (few for part in logits for few in torch.split(part, SOFTMAX_ROWS[device.type])):
        here = ((batch.rows >= first) & (batch.rows < first + len(few))).nonzero().squeeze(-1)  # triples of these rows
        if len(here):
            # Without waiting for the GPU, which a plain copy does.
            row, here = (t.to(device, non_blocking=True) for t in (batch.rows[here] - first, here))
            predictions = few.float().log_softmax(dim=-1)  # [rows, vocabulary]
            values[here] = predictions[row, batch.targets[here]]
            greedy[here] = (values[here] == predictions.amax(dim=-1)[row]).float()
            del predictions  # as large as what the next rows need
        first += len(few)
    log_probs, most_probable = terms.tolist()
    return log_probs, list(map(bool, most_probable))
