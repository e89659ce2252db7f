"""Solutions of notebook 01."""

import math

import llmlab


def seconds_at_least(flops, fetched, peak, bandwidth):
    return max(flops / peak, fetched / bandwidth)


def kv_bytes(name):
    card = llmlab.model_card(name)
    return 2 * card.layers * card.kv_heads * card.head_dim * 2  # a key and a value, 2 bytes a number


def tokens_at_the_ridge(size, peak, bandwidth):
    return math.ceil(size * peak / bandwidth / 2)  # 2 n FLOPs for each weight of `size` bytes
