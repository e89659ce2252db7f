"""The reference path: plain batched scoring, against which every fast path is held.

Which logit scores which token (context a b c, ending d e):

    position   0   1   2   3   4
    input      a   b   c   d   e
    logits     ^   ^   ^   ^   ^
    predict    b   c   d   e   -      log p(ending) = log p(d | a b c) + log p(e | a b c d)
                       └───┴── the ending's tokens are scored one position before they stand
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from llmlab.model.lm import LM
from llmlab.model.selfcheck import check, plain_logits, probe, unrounded
from llmlab.scoring.encode import Sequence
from llmlab.scoring.scores import OnBatch, Scores, Work, check_finite


def log_probs(lm: LM, sequences: list[Sequence], *, batch_size: int = 8, on_batch: OnBatch | None = None) -> Scores:
    """Log-probability of each sequence's ending given its context, in the order given.

    Longest sequences come first: padding stays small, running out of memory happens at once, and the time left is
    never underestimated. Rows are padded on the right and the padding is masked; a model whose numbers that changes,
    which a self-check finds, is given one sequence at a time, with a warning. Soft-max in fp32.

    Args:
        lm: the model.
        sequences: from `encode`.
        batch_size: sequences a forward pass.
        on_batch: called after each batch with its sequences and their log-probabilities.

    Raises:
        NumericalError: a log-probability is NaN or infinite; names the batch.
    """
    if batch_size > 1:
        with unrounded(lm.model):
            padded = check(lm, "a padded batch", lambda: _probe_in_a_batch(lm), lambda: plain_logits(lm))
        if not padded.passed:
            warnings.warn(f"{lm.name} is scored one sequence at a time: {padded.reason}.", stacklevel=3)
            batch_size = 1
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    limit = rotary_limit(lm)
    longer = [i for i in order if len(sequences[i].ids) > limit]
    batches = in_groups(longer, batch_size) + in_groups(order[len(longer) :], batch_size)
    scores = score_batches(lm, sequences, batches, on_batch)
    return replace(scores, settings=scores.settings | {"batch_size": str(batch_size)})


def rotary_limit(lm: LM) -> float:
    """Tokens of the longest sequence with the ordinary rotary frequencies; inf where all have the same.

    LongRoPE (arXiv 2402.13753) has others for a batch that holds a longer sequence: such ones go in their own batches.
    """
    parameters = getattr(lm.model.config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]  # of all layers, or by type
    limits = [k["original_max_position_embeddings"] for k in kinds if k.get("rope_type") == "longrope"]
    return min(limits, default=float("inf"))


def in_groups(order: list[int], size: int) -> list[list[int]]:
    """A list in pieces of `size`; the last one may be shorter."""
    return [order[first : first + size] for first in range(0, len(order), size)]


@torch.inference_mode()
def score_batches(
    lm: LM, sequences: list[Sequence], batches: list[list[int]], on_batch: OnBatch | None = None
) -> Scores:
    """The same in given batches: lists of indices into `sequences`."""
    log_probs, greedy = [0.0] * len(sequences), [False] * len(sequences)
    places = 0
    for number, indices in enumerate(batches):
        batch = [sequences[i] for i in indices]
        places += len(batch) * max(len(s.ids) for s in batch)
        rows = _endings(lm, batch)
        values = torch.stack([tokens.sum() for tokens, _ in rows]).tolist()
        check_finite(batch, values, number, lm.dtype)
        for i, value, (_, best) in zip(indices, values, rows, strict=True):
            log_probs[i], greedy[i] = value, bool(best)
        if on_batch:
            on_batch(batch, values)
    tokens = sum(len(s.ids) for s in sequences)
    work = Work(tokens, len(batches), asked=places, padding=1 - tokens / places)
    return Scores(log_probs, work, greedy, {"method": "reference"})


@torch.inference_mode()
def token_log_probs(lm: LM, batch: list[Sequence]) -> list[torch.Tensor]:
    """Log-probability of every ending token of a batch in one forward pass: for each sequence [n_ending] fp32, nats."""
    return [values for values, _ in _endings(lm, batch)]


def _endings(lm: LM, batch: list[Sequence]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same, each with whether greedy decoding would write all of these tokens."""
    endings = []
    for sequence, row in zip(batch, _logits(lm, [s.ids for s in batch]), strict=True):
        first, last = sequence.n_context, len(sequence.ids)
        predictions = row[first - 1 : last - 1].float().log_softmax(dim=-1)  # [n_ending, vocabulary]
        targets = torch.tensor(sequence.ids[first:], device=row.device)
        values = predictions.gather(-1, targets[:, None]).squeeze(-1)
        endings.append((values, (values == predictions.amax(dim=-1)).all()))
    return endings


def _logits(lm: LM, rows: list[list[int]]) -> torch.Tensor:
    """One forward pass over rows of ids, padded on the right: [batch, longest, vocabulary]."""
    longest = max(map(len, rows))
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows], device=lm.device)  # [batch, longest]
    lengths = torch.tensor([len(ids) for ids in rows], device=lm.device)
    attention_mask = (torch.arange(longest, device=lm.device) < lengths[:, None]).long()
    logits: torch.Tensor = lm.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits


def _probe_in_a_batch(lm: LM) -> torch.Tensor:
    rows = probe(lm)
    return torch.cat([logits[: len(ids)] for ids, logits in zip(rows, _logits(lm, rows), strict=True)])
