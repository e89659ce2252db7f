"""What the fullest device of a layout holds: weights, KV cache, and a pass at its widest point."""

from __future__ import annotations

from llmlab.model.card import ModelCard
from llmlab.sharding.costs import matrices_into_mlp
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.pipeline import ASKED, layers_of

SOFTMAX = 1024  # rows of logits that scoring takes in fp32 at once on a GPU
IN_LAYER, IN_STAGE = 4, 2  # hidden states beside a layer's own: see `_activations`
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
    layer's input, the residual stream and its norm, and on a stage what came in and what comes in for the next pass. Of
    packed weights the largest matrix is unpacked while one of the MLP's tensors is not there yet.
    """
    hidden, mlp = card.hidden_size, card.intermediate_size / cuts.tensor
    inner = max((1 + min(2, round(matrices_into_mlp(card)))) * mlp, ROTATED * card.heads * card.head_dim / cuts.tensor)
    layer = 2 * tokens * ((IN_LAYER + (IN_STAGE if cuts.pipeline > 1 else 0)) * hidden + inner)
    if bits < 16:
        layer += max(0.0, 2 * (hidden - tokens) * mlp)
    asked = ASKED * tokens
    scored = 2 * asked + 2 * 4 * min(asked, SOFTMAX)  # bytes a token of the vocabulary; fp32 logits and their soft-max
    gathered = 4 * asked * (1 + 1 / cuts.tensor) if cuts.tensor > 1 else 0.0  # the ranks' parts, and side by side
    return round(max(layer, card.vocab_size * max(scored, gathered) if last else 0.0))
