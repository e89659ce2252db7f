"""Solutions of notebook 00."""


def wilson_interval(hits, n):
    p, z = hits / n, 1.96
    centre, root = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return (centre - root) / (1 + z**2 / n), (centre + root) / (1 + z**2 / n)


def choose(log_probs, endings):
    by_character = [value / len(text) for value, text in zip(log_probs, endings, strict=True)]
    return by_character.index(max(by_character))
