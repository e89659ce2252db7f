"""Solutions of notebook 02."""

import math


def bubble(stages, batches):
    return (stages - 1) / (batches + stages - 1)


def all_reduce_bytes(ranks, tokens):
    tensor = 2 * 6656 * tokens  # bytes
    return ranks * 2 * (ranks - 1) / ranks * tensor  # 2 (t - 1) pieces of a t-th from each rank


def slowest_stage(layers, stages, head):
    def slowest(last):  # layers on the last stage; the others share the rest evenly
        return max(last + head, math.ceil((layers - last) / (stages - 1)))

    return min(map(slowest, range(1, layers - stages + 2)))
