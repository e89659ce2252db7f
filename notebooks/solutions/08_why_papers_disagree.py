"""Solutions of notebook 08."""

import math


def word_perplexity(nll, tokens, words):
    return math.exp(nll * tokens / words)


def holm(p):
    corrected, largest = list(p), 0.0
    for done, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, p[place] * (len(p) - done)))
        corrected[place] = largest
    return corrected
