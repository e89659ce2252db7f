"""The reference path: plain batched scoring, against which every fast path is held.

Which logit scores which token (context a b c, ending d e):

    position   0   1   2   3   4
    input      a   b   c   d   e
    logits     ^   ^   ^   ^   ^
    predict    b   c   d   e   -      log p(ending) = log p(d | a b c) + log p(e | a b c d)
                       └───┴── the ending's tokens are scored one position before they stand
"""

from __future__ import annotations

import torch

from llmlab.model.lm import LM
from llmlab.scoring.encode import Sequence
from llmlab.scoring.scores import OnBatch, Scores, Work, check_finite


def log_probs(lm: LM, sequences: list[Sequence], *, batch_size: int = 8, on_batch: OnBatch | None = None) -> Scores:
    """Log-probability of each sequence's ending given its context, in the order given.

    Longest sequences come first: padding stays small, running out of memory happens at once, and the time left is
    never underestimated. Rows are padded on the right and the padding is masked. Soft-max in fp32.

    Args:
        lm: the model.
        sequences: from `encode`.
        batch_size: sequences a forward pass.
        on_batch: called after each batch with its sequences and their log-probabilities.

    Raises:
        NumericalError: a log-probability is NaN or infinite; names the batch.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    return score_batches(lm, sequences, in_groups(order, batch_size), on_batch)


def in_groups(order: list[int], size: int) -> list[list[int]]:
    """A list in pieces of `size`; the last one may be shorter."""
    return [order[first : first + size] for first in range(0, len(order), size)]


@torch.inference_mode()
def score_batches(
    lm: LM, sequences: list[Sequence], batches: list[list[int]], on_batch: OnBatch | None = None
) -> Scores:
    """The same in given batches: lists of indices into `sequences`."""
    log_probs = [0.0] * len(sequences)
    places = 0
    for number, indices in enumerate(batches):
        batch = [sequences[i] for i in indices]
        places += len(batch) * max(len(s.ids) for s in batch)
        values = torch.stack([tokens.sum() for tokens in token_log_probs(lm, batch)]).tolist()
        check_finite(batch, values, number, lm.dtype)
        for i, value in zip(indices, values, strict=True):
            log_probs[i] = value
        if on_batch:
            on_batch(batch, values)
    tokens = sum(len(s.ids) for s in sequences)
    return Scores(log_probs, Work(tokens, len(batches), asked=places, padding=1 - tokens / places))


@torch.inference_mode()
def token_log_probs(lm: LM, batch: list[Sequence]) -> list[torch.Tensor]:
    """Log-probability of every ending token of a batch in one forward pass: for each sequence [n_ending] fp32, nats."""
    longest = max(len(s.ids) for s in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)  # [batch, longest]
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(batch):
        input_ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        attention_mask[row, : len(sequence.ids)] = 1
    input_ids, attention_mask = input_ids.to(lm.device), attention_mask.to(lm.device)
    logits = lm.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # [batch, longest, V]
    values = []
    for row, sequence in enumerate(batch):
        first, last = sequence.n_context, len(sequence.ids)
        predictions = logits[row, first - 1 : last - 1].float().log_softmax(dim=-1)  # [n_ending, V]
        values.append(predictions.gather(-1, input_ids[row, first:last, None]).squeeze(-1))
    return values
