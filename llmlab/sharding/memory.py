"""What the fullest device of a layout holds: weights, KV cache, and a pass at its widest point."""

from __future__ import annotations

from llmlab.model.card import ModelCard
from llmlab.sharding.costs import matrices_into_mlp
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.pipeline import ASKED, layers_of

SOFTMAX = 1024  # rows of logits that scoring takes in fp32 at once on a GPU
ROTATED = 7  # of the width of all heads: queries, keys, values, and what rotating the first two makes meanwhile


def fullest(card: ModelCard, cuts: Cuts, bits: int, tokens: int) -> tuple[int, int, int]:
    """Bytes of weights, KV cache and activations on the device that holds the most; `tokens` of a pass and a cache."""
    stages = [
        (*_held(card, cuts, bits, tokens, bounds), _activations(card, cuts, bits, tokens, bounds[1] == card.layers))
        for bounds in layers_of(card, cuts.pipeline)
    ]
    return max(stages, key=sum)


def _held(card: ModelCard, cuts: Cuts, bits: int, tokens: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """Weights and KV cache of the stage with this first and end layer."""
    first, end = bounds
    # Heads are cut in whole KV groups, so the fullest rank may hold more than its share: an upper bound, as the MLP is
    # cut evenly.
    share = (end - first) / card.layers * -(-card.kv_heads // cuts.tensor) / card.kv_heads
    # Embedding and head (one matrix when tied) sit on the first and the last stage, cut over the tensor ranks.
    rest = card.parameters - card.linear_parameters
    ends = 0 if first else rest - (0 if card.tied else card.head_parameters)
    ends += card.head_parameters if end == card.layers and (first or not card.tied) else 0
    weights = (card.weight_bytes(bits) - 2 * rest) * share + 2 * ends / cuts.tensor
    return round(weights), round(tokens * card.kv_values * 2 * share)


def _activations(card: ModelCard, cuts: Cuts, bits: int, tokens: int, last: bool) -> int:
    """A pass over `tokens` at its widest point, 2 bytes a number: a layer, or the output head on the last stage.

    A layer has the MLP's tensors, or what attention makes of queries and keys; beside it stand the embeddings, the
    layer's input, the residual stream and its norm. Of packed weights the largest matrix is unpacked while one of the
    MLP's tensors is not there yet. A stage keeps what came in, and has what comes in for the next pass.
    """
    stream, mlp = 2 * tokens * card.hidden_size, card.intermediate_size / cuts.tensor
    inner = max((1 + min(2, round(matrices_into_mlp(card)))) * mlp, ROTATED * card.heads * card.head_dim / cuts.tensor)
    widest = 4 * stream + 2 * tokens * inner
    if bits < 16:
        widest += max(0.0, 2 * (card.hidden_size - tokens) * mlp)
    if last:
        asked = ASKED * tokens
        logits = 2 * asked * card.vocab_size
        scored = logits + 2 * 4 * min(asked, SOFTMAX) * card.vocab_size  # in fp32, and their soft-max
        gathered = 2 * logits * (1 + 1 / cuts.tensor) + stream if cuts.tensor > 1 else 0.0  # parts, and side by side
        widest = max(widest, scored, gathered)
    return round(widest + (2 * stream if cuts.pipeline > 1 else 0))
