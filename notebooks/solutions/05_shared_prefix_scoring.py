"""Solutions of notebook 05."""

import torch


def trie_mask(depths):
    n = len(depths)
    # Node i is in the subtree of j as long as, from behind j up to i, everything stands deeper than j.
    return torch.tensor(
        [[j <= i and min(depths[j + 1 : i + 1], default=n) > depths[j] for j in range(n)] for i in range(n)]
    )


def count_nodes(sequences):
    return len({tuple(ids[:k]) for ids in sequences for k in range(1, len(ids))})


def count_asked(sequences, n_context):
    return len({tuple(ids[:k]) for ids in sequences for k in range(n_context, len(ids))})
