import numpy as np
import pytest
from scipy.stats import binomtest

from llmlab.base.stats import mcnemar, median_interval, proportion, wilson


@pytest.mark.parametrize("successes, n", [(0, 5), (5, 5), (3, 40), (400, 1000), (1, 1)])
def test_wilson_equals_scipy(successes, n):
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError, match="4 of 3"):
        wilson(4, 3)
    with pytest.raises(ValueError, match="0 of 0"):
        wilson(0, 0)


def test_proportion_is_a_metric_with_its_interval():
    metric = proportion([True, False, True, True])
    assert metric.value == 0.75
    assert metric.low < 0.75 < metric.high
    assert str(metric) == "0.75 [0.3006, 0.9544]"


def test_mcnemar_counts_only_the_differing_items():
    a = [True] * 50 + [True] * 9 + [False] * 1
    b = [True] * 50 + [False] * 9 + [True] * 1
    assert mcnemar(a, b) == pytest.approx(binomtest(1, 10).pvalue)
    assert mcnemar(a, a) == 1.0
    with pytest.raises(ValueError, match="same items"):
        mcnemar(a, b[:-1])


def test_median_interval_covers_the_true_median_about_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high = median_interval(rng.exponential(size=25), draws=400)
        covered += low <= np.log(2) <= high
    assert 0.88 <= covered / 200 <= 0.99
