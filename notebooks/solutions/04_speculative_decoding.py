"""Solutions of notebook 04."""


def expected_tokens(rate, k):
    return sum(rate**i for i in range(k + 1))


def best_k(rate, seconds, draft_seconds):
    def tokens_per_second(k):
        return expected_tokens(rate, k) / (seconds[k] + k * draft_seconds)  # seconds[k]: of a pass over k + 1 tokens

    return max(range(len(seconds)), key=tokens_per_second)


def verify_greedy(drafted, own):
    kept = 0
    while kept < len(drafted) and drafted[kept] == own[kept]:
        kept += 1
    return kept, own[kept]
