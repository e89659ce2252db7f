"""The cost model by hand."""

import pytest

from llmlab.decoding.cost import Rate, Tally, best_k, best_size, expected_tokens, plain_seconds, speedup, worth
from llmlab.decoding.draft import Proposal


def test_expected_tokens_is_leviathans_equation_1():
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.8, 3) == pytest.approx(1 + 0.8 + 0.64 + 0.512)


def test_speedup_counts_the_draft_and_the_wider_pass():
    # 2 tokens drafted at 1 s each, verified in 5 s; plain decoding takes 4 s a token.
    assert speedup(0.5, 2, lambda width: 4.0 if width == 1 else 5.0, 1.0) == pytest.approx(1.75 * 4 / 7)


def test_k_is_zero_where_nothing_pays_and_large_where_all_is_accepted():
    assert best_k(0.9, lambda width: float(width), 0.5, 8) == 0  # verifying costs as much as decoding
    assert best_k(0.3, lambda width: 1.0, 0.5, 8) == 0
    assert best_k(1.0, lambda width: 1.0, 0.0, 8) == 8


def test_a_pass_is_as_wide_as_serves_all_its_rows():
    chain = [0.9**depth for depth in range(1, 5)]
    poor = [0.1**depth for depth in range(1, 5)]
    size, gain = best_size([chain, poor], lambda width: 1.0, [1, 1])
    assert size == 4 and gain == pytest.approx((expected_tokens(0.9, 4) + expected_tokens(0.1, 4)) / 2)
    assert best_size([poor, poor], lambda width: float(width), [1, 1]) == (0, 1.0)
    assert best_size([[]], lambda width: 1.0, [1]) == (0, 1.0)
    # A tree: the second token pays for itself, the third does not.
    assert best_size([[0.6, 0.5, 0.1]], lambda width: 1 + 0.2 * (width - 1), [1])[0] == 2
    # The row that guesses well is far ahead: a wider pass would only keep the other one waiting.
    rising = [1.0, 1.2, 1.4, 1.6, 1.8]
    assert best_size([chain, []], lambda width: rising[width - 1], [1, 1])[0] == 4
    assert best_size([chain, []], lambda width: rising[width - 1], worth([20, 80], [4, 1]))[0] == 0


def test_plain_decoding_halves_its_batch_as_the_engine_does():
    # Rows of 1, 2, 3 and 3 tokens: after two of four have ended two go on.
    assert plain_seconds([1, 2, 3, 3], lambda rows: float(rows)) == 4 + 4 + 2
    assert plain_seconds([], lambda rows: 1.0) == 0


def test_a_rate_follows_what_it_sees():
    rate = Rate(prior=0.5)
    assert rate.value == 0.5
    for _ in range(20):
        rate.observe(4, 4)
    assert rate.value > 0.9
    for _ in range(40):
        rate.observe(0, 1)
    assert rate.value < 0.5


def test_a_tally_predicts_what_it_counted():
    tally = Tally()
    for accepted in (2, 2, 1, 0):
        tokens = [7, 8, 9][:accepted] + [1]
        tally.observe(Proposal.chain([7, 8], "draft").calibrated(0.5), tokens)
        tally.passes += 1
        tally.seconds += 2.0
        tally.plain_seconds += accepted + 1.0
    assert (tally.tokens, tally.drafted, tally.accepted) == (9, 8, 5)
    assert tally.acceptance_rate == pytest.approx(5 / 7)
    assert tally.tokens_per_pass == pytest.approx(1 + 5 / 4)
    assert tally.predicted_tokens_per_second == pytest.approx(expected_tokens(0.5, 2) * 4 / 8)
    assert tally.predicted_speedup == pytest.approx(expected_tokens(0.5, 2) / 2)
    assert Tally().predicted_speedup == 1.0
