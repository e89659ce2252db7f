"""The reference path: plain batched scoring, against which every fast path is held.

Which logit scores which token (context a b c, ending d e):

    position   0   1   2   3   4
    input      a   b   c   d   e
    logits     ^   ^   ^   ^   ^
    predict    b   c   d   e   -      log p(ending) = log p(d | a b c) + log p(e | a b c d)
                       └───┴── the ending's tokens are scored one position before they stand
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmlab.model.lm import LM
from llmlab.scoring.encode import Sequence, check_finite


@torch.inference_mode()
def log_probs(
    lm: LM,
    sequences: list[Sequence],
    *,
    batch_size: int = 8,
    on_batch: Callable[[list[Sequence], list[float]], None] | None = None,
) -> tuple[list[float], float]:
    """Log-probability of each sequence's ending given its context, in nats, in the order given; share of padding.

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
    result = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [sequences[i] for i in chosen]
        values = torch.stack([tokens.sum() for tokens in token_log_probs(lm, batch)])
        check_finite(batch, values.tolist(), start // batch_size, lm.dtype)
        for i, value in zip(chosen, values.tolist(), strict=True):
            result[i] = value
        if on_batch:
            on_batch(batch, values.tolist())
    lengths = [len(sequences[i].ids) for i in order]
    padded = sum(
        max(lengths[k : k + batch_size]) * len(lengths[k : k + batch_size]) for k in range(0, len(order), batch_size)
    )
    return result, 1 - sum(lengths) / padded


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
