"""Token Recycling: guess what the model itself held likely behind the same token before (arXiv 2408.08696).

Every pass gives a distribution behind each of its tokens, those of rejected guesses included, of which decoding uses
one token and throws the rest away. Section 3.1 of the paper keeps the k likeliest in an adjacency matrix: token ->
tokens that followed it best when it last stood in a pass. Section 3.2 unrolls the matrix from the row's last token into
a tree, which a pass verifies; section 3.3 updates the matrix by what that pass says. A table of a few MB, and no text
that must repeat itself: it guesses on every kind of prompt, where lookup waits for copies.

The paper's tree is fixed, made once from how often each rank is right. Here those frequencies are counted while the
model decodes, and the tree is the one that is best by them.
"""

from __future__ import annotations

from functools import partial

import torch

from llmlab.decoding.draft import Free, Proposal, Sampling, grow

KEPT = 8  # successors of a token, as in the paper
BLOCK = 256  # tokens of the vocabulary that `likeliest` looks at together
TOKENS = 16  # of a tree; the cost model verifies the best of them
FIRST = 0.4  # how often the likeliest successor is taken to be right at first; the next ones less, as 1 / rank^2
TRIALS = 16.0  # which such a guess is worth


class Recycling(Free):
    """The tokens that the model held likely behind the same token when that last stood in a pass, as a tree.

    Keep the object: what it learned from earlier prompts serves the next ones.
    """

    name = "recycling"

    def __init__(self) -> None:
        self.successors: dict[int, list[int]] = {}  # of each token, the likeliest first
        self.hits = [TRIALS * FIRST / (rank + 1) ** 2 for rank in range(KEPT)]  # successors that were right, by rank
        self.trials = TRIALS

    def learn(self, tokens: list[list[int]], logits: torch.Tensor) -> None:
        """Keep the likeliest successors of each token of the pass, and count which of those known it takes now."""
        width = max(map(len, tokens))
        for ids, of_row in zip(tokens, likeliest(logits[:, :width], KEPT).tolist(), strict=True):
            for token, successors in zip(ids, of_row, strict=False):  # behind the row's tokens stands padding
                if known := self.successors.get(token):
                    self.trials += 1
                    if successors[0] in known:
                        self.hits[known.index(successors[0])] += 1
                self.successors[token] = successors

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """A tree behind each row's last token."""
        del sampling
        chances = [hits / self.trials for hits in self.hits]
        behind = partial(self._behind, chances)
        return [grow(self.name, ids[-1], behind, TOKENS, k) for ids in contexts]

    def _behind(self, chances: list[float], token: int) -> list[tuple[int, float, int]]:
        """What may follow a token, see `grow`; its state is the token itself."""
        known = self.successors.get(token, [])
        return [(after, chance, after) for after, chance in zip(known, chances, strict=False)]


def likeliest(logits: torch.Tensor, kept: int) -> torch.Tensor:
    """The ids of the `kept` largest of [batch, width, vocabulary] logits, the largest first: [batch, width, kept].

    What torch.topk gives, ten times faster on CPU: they stand in the `kept` blocks that have the largest maxima.
    """
    kept, missing = min(kept, logits.shape[-1]), -logits.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits
    blocks = padded.view(*logits.shape[:2], -1, BLOCK)
    best = blocks.amax(dim=-1).topk(min(kept, blocks.shape[-2])).indices
    inside = blocks.gather(-2, best[..., None].expand(-1, -1, -1, BLOCK)).flatten(-2).topk(kept).indices
    return best.gather(-1, inside // BLOCK) * BLOCK + inside % BLOCK
