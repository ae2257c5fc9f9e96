import math

import numpy as np
import pytest

from align_cluster.algorithms.slas import Slas, largest_gamma, moment, widest_gamma
from align_cluster.algorithms.trust import TrustRegion, bound

HEAVY = np.random.default_rng(0).standard_t(4, size=2000)
GAMMAS = np.linspace(0, 3, 61)


def two_valued(radius: float) -> np.ndarray:
    """100 values with mean square 1: 0, and +-radius as often as that needs; moment = radius^(2 gamma)."""
    count = round(100 / radius**2)
    assert count / 100 * radius**2 == pytest.approx(1)
    return radius * np.where(np.arange(100) < count, (-1.0) ** np.arange(100), 0.0)


def bounded(limit: float, radius: float) -> float:
    """Appendix E, |A| <= R with R > 1."""
    return math.log(limit) / (2 * math.log(radius)) - 1


def sub_gaussian(limit: float, scale: float) -> float:
    """Appendix E: the root of (scale sqrt(p))^p = limit, p = 2 (1 + gamma), where it grows with p."""
    low, high = 2.0, 50.0
    for _ in range(100):
        p = (low + high) / 2
        low, high = (p, high) if p * math.log(scale * math.sqrt(p)) <= math.log(limit) else (low, p)
    return low / 2 - 1


def estimates(**changes) -> dict:
    return {"lambda_max": 0.5, "score_norm": 2.0, "step_norm": 1e-3, "gradient_norm": 0.1, "step_kl": 4e-4} | changes


def region(**settings) -> TrustRegion:
    return TrustRegion(Slas(gamma="adaptive", bound="worst_case", delta=1e-3, **settings))


@pytest.mark.parametrize("u", [HEAVY, np.sign(HEAVY), two_valued(2.0), np.maximum(HEAVY, 0)])
def test_the_moment_starts_at_one_and_never_falls(u):
    moments = [moment(u, gamma) for gamma in GAMMAS]
    assert moments[0] == pytest.approx(1)
    assert (np.diff(moments) >= -1e-12).all()


def test_the_moment_is_that_of_advantages_scaled_to_mean_square_one():
    u = [0.5, -1.5, 2.0]
    scale = ((0.25 + 2.25 + 4.0) / 3) ** 0.5
    expected = sum(abs(x / scale) ** 3.0 for x in u) / 3
    assert moment(np.array(u), 0.5) == pytest.approx(expected)
    assert moment(37 * np.array(u), 0.5) == pytest.approx(expected)
    assert moment(np.zeros(4), 0.5) == 0


@pytest.mark.parametrize("limit", [1.05, 1.5, 4.0, 30.0])
def test_the_largest_gamma_meets_the_bound_and_is_on_its_safe_side(limit):
    gamma = largest_gamma(HEAVY, limit, 10.0, 1e-9)
    assert 0 < gamma < 10
    assert moment(HEAVY, gamma) <= limit and moment(HEAVY, gamma) == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("radius", [2.0, 5.0])
@pytest.mark.parametrize("limit", [1.5, 40.0])
def test_the_largest_gamma_of_two_valued_advantages_is_the_closed_form(radius, limit):
    expected = math.log(limit) / (2 * math.log(radius))
    assert largest_gamma(two_valued(radius), limit, 10.0) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("limit", [20.0, 300.0])
def test_the_papers_worst_cases_never_allow_more_than_the_advantages_do(limit):
    normal = np.random.default_rng(1).standard_normal(200_000)
    measured = largest_gamma(normal, limit, 10.0)
    assert 0 < sub_gaussian(limit, 1.0) <= measured  # (E|Z|^p)^(1/p) <= sqrt(p) for a standard normal
    radius = np.abs(normal).max() / normal.std()
    assert bounded(limit, radius) <= measured
    p = 2 * (1 + measured)  # and the moment of a normal is known
    exact = 2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi)
    assert exact == pytest.approx(limit, rel=0.1)


def test_a_normal_reaches_the_default_tail_at_its_closed_form():
    """E|Z|^(2 + 2 gamma) = 2^(1 + gamma) Gamma(1.5 + gamma) / sqrt(pi) is 2 at gamma .6921."""
    assert 2**1.6921 * math.gamma(2.1921) / math.sqrt(math.pi) == pytest.approx(2, abs=1e-3)
    normal = np.random.default_rng(1).standard_normal(2_000_000)
    assert widest_gamma([normal], Slas(gamma="adaptive")) == pytest.approx(0.692, abs=0.01)


def test_the_tail_of_every_update_counts_by_itself_and_no_scale_does():
    config = Slas(gamma="adaptive", tail=3.0)
    normal = np.random.default_rng(1).standard_normal(2000)
    alone = [widest_gamma([u], config) for u in (normal, HEAVY)]
    assert alone[0] > alone[1] > 0 and widest_gamma([normal, HEAVY], config) == alone[1]
    assert widest_gamma([1e3 * normal, 1e-3 * HEAVY], config) == pytest.approx(alone[1], abs=2e-6)
    assert widest_gamma([normal, np.zeros(9)], config) == alone[0]  # an update without a signal limits nothing
    assert widest_gamma([np.sign(HEAVY)], config) == config.gamma_max
    assert widest_gamma([HEAVY], Slas(gamma="adaptive", tail=1.0)) < 1e-5


def test_the_search_ends_at_its_limits():
    assert largest_gamma(HEAVY, 0.99, 2.0) == 0
    assert largest_gamma(HEAVY, math.nan, 2.0) == 0
    assert largest_gamma(HEAVY, math.inf, 2.0) == 2
    assert largest_gamma(np.sign(HEAVY), 1 + 1e-9, 2.0) == 2  # all of one size: shaping changes nothing


def test_the_bound_is_two_delta_over_what_a_step_changes():
    assert bound(1e-5, 2e-3, 0.1, 0.5, 3.0) == pytest.approx(2 * 1e-5 / ((2e-3 / 0.1) ** 2 * 0.5 * 9))
    assert bound(1e-5, 2e-3, 0.1, 0.0, 3.0) == math.inf
    assert bound(1e-5, 2e-3, 0.0, 0.5, 3.0) == 0


def test_a_step_at_the_bound_changes_a_linear_gaussian_policy_by_delta_at_most():
    """Mean J theta, deviation s, KL exact; the step is the shaped policy gradient of drawn samples."""
    rng = np.random.default_rng(4)
    dimension, s, count, a = 8, 0.7, 400, 0.05
    jacobian = rng.standard_normal((dimension, 20)) / 5
    noise = s * rng.standard_normal((count, dimension))
    scores = noise @ jacobian / s**2 / dimension  # gradients of mean log-probs
    u = noise[:, 0] / noise[:, 0].std()
    fisher = jacobian.T @ jacobian / s**2 / dimension
    largest, score_norm = np.linalg.eigvalsh(fisher)[-1], np.linalg.norm(scores, axis=1).max()
    for gamma in (0.0, 0.5, 1.5):
        gradient = (np.sign(u) * np.abs(u) ** (1 + gamma)) @ scores / count
        step = a * gradient
        kl = np.sum((jacobian @ step) ** 2) / (2 * s**2 * dimension)
        delta = moment(u, gamma) * a**2 * largest * score_norm**2 / 2
        lengths = np.linalg.norm(step), np.linalg.norm(gradient)
        assert bound(delta, *lengths, largest, score_norm) == pytest.approx(moment(u, gamma))
        assert largest_gamma(u, bound(delta, *lengths, largest, score_norm), 3.0) == pytest.approx(gamma, abs=1e-5)
        assert 0 < kl <= delta


def test_advantages_stay_linear_until_the_first_estimate_which_counts_whole():
    trust = region()
    assert trust.gamma == 0
    metrics = trust.observe(estimates(), HEAVY)
    limit = 2 * 1e-3 / (1e-2**2 * 0.5 * 4)
    assert trust.gamma == pytest.approx(largest_gamma(HEAVY, limit, 2.0)) and 0 < trust.gamma < 2
    assert metrics == pytest.approx(
        {
            "slas/gamma": trust.gamma,
            "slas/moment": moment(HEAVY, trust.gamma),
            "slas/bound": limit,
            "slas/step_kl": 4e-4,
            "slas/lambda_max": 0.5,
            "slas/score_norm": 2.0,
        }
    )


def test_gamma_is_the_exponential_mean_of_its_estimates():
    trust, single = region(), []
    for step in (1e-3, 8e-4, 1.2e-3, 1.0):
        trust.observe(estimates(step_norm=step), HEAVY)
        single.append(largest_gamma(HEAVY, bound(1e-3, step, 0.1, 0.5, 2.0), 2.0))
    weights = [0.9**3, 0.9**2, 0.9, 1.0]
    assert single[-1] == 0 and len(set(single)) == 4
    assert trust.gamma == pytest.approx(np.average(single, weights=weights))


def test_without_smoothing_the_last_estimate_counts():
    trust = region(ema=0.0)
    trust.observe(estimates(), HEAVY)
    trust.observe(estimates(step_norm=8e-4), HEAVY)
    assert trust.gamma == pytest.approx(largest_gamma(HEAVY, bound(1e-3, 8e-4, 0.1, 0.5, 2.0), 2.0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("nothing", [{"gradient_norm": 0.0}, {"step_norm": 0.0, "step_kl": 0.0}, {}])
def test_an_update_that_shows_nothing_leaves_gamma_as_it_is(nothing):
    trust, u = region(), HEAVY if nothing else np.zeros(10)
    trust.observe(estimates(**nothing), u)
    assert trust.gamma == 0
    trust.observe(estimates(), HEAVY)
    before = trust.gamma
    assert trust.observe(estimates(**nothing), u)["slas/gamma"] == before == trust.gamma > 0


def test_a_restored_region_goes_on_as_the_first_would_have():
    first, second = region(), region()
    first.observe(estimates(), HEAVY)
    state = first.state()
    assert all(type(value) is float for value in state.values())
    second.restore(state)
    assert second.gamma == first.gamma
    assert first.observe(estimates(step_norm=8e-4), HEAVY) == second.observe(estimates(step_norm=8e-4), HEAVY)
