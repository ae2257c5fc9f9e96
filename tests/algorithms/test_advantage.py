from itertools import product

import numpy as np
import pytest
from pydantic import ValidationError

from align_cluster.algorithms.advantage import AdvantageConfig, credit, linear, normalise
from align_cluster.algorithms.slas import Slas

from ..cases import each

P, M = 5, 6
MEANS, STDS = ("group", "leave_one_out", "global"), ("group", "batch", "update", "none")
MIXES = ("sum_then_normalise", "normalise_then_sum", "gdpo")
EVERY = [
    AdvantageConfig(mean=mean, std=std, std_of=of, ddof=ddof, mix=mix)
    for mean, std, of, ddof, mix in product(MEANS, STDS, ("raw", "centred"), (0, 1), MIXES)
    if of == "raw" or std != "none"
]
EVERY += [one.model_copy(update={"rescale_weights": False}) for one in EVERY[1::7] if one.mix != "sum_then_normalise"]
SHAPED = [
    AdvantageConfig(mean=mean, std=std, eps=1e-9, mix=mix, clip=clip, shaping=Slas(order=order, recentre=recentre))
    for mean, std, mix, order, recentre, clip in product(
        ("group", "global"),
        ("batch", "update"),
        MIXES,
        ("norm_then_shape", "shape_then_norm"),
        (False, True),
        (None, 1.2),
    )
]
GOLDEN = np.array([[0.2, 0.4, 0.5, 0.9], [0.1, 0.1, 0.1, 0.1]])


def example(seed: int = 0, masked: float = 0.0) -> dict[str, np.ndarray]:
    """Two rewards of unlike range. The second does not judge prompt 3, prompt 1 is flat in both."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(size=(2, P, 1)) + 0.3 * rng.standard_normal((2, P, M))
    values[1] *= 0.02
    values[:, 1] = 1 / 3
    applies = np.ones((2, P, M), bool)
    applies[1, 3] = False
    batches = np.repeat([0, 1, 0, 1, 1], M).reshape(P, M)
    valid = rng.uniform(size=(P, M)) >= masked
    values[~(applies & valid)] = np.nan
    return {"values": values, "applies": applies, "valid": valid, "weights": np.array([1.0, -7.0]), "batches": batches}


def single(rewards, valid=None, batches=None) -> dict[str, np.ndarray]:
    """Arguments of one reward with weight 1."""
    rewards = np.asarray(rewards, dtype=np.float64)
    valid = np.ones_like(rewards, bool) if valid is None else valid
    batches = np.zeros(rewards.shape, int) if batches is None else batches
    ones = np.ones((1, *rewards.shape), bool)
    return {"values": rewards[None], "applies": ones, "valid": valid, "weights": np.ones(1), "batches": batches}


def mean_of(numbers):
    return sum(numbers) / len(numbers)


def std_of(numbers, ddof=0):
    middle = mean_of(numbers)
    return (sum((x - middle) ** 2 for x in numbers) / max(len(numbers) - ddof, 1)) ** 0.5


def pool_of(kind, cell, cells, batches):
    """The cells that `cell` is compared with."""
    if kind == "group":
        return [other for other in cells if other[0] == cell[0]]
    return [other for other in cells if kind in ("global", "batch") or batches[other] == batches[cell]]


def one_reward(r: dict, config, batches) -> dict:
    """Definitions of section 2.1 for rewards by cell (p, m), one number at a time; only valid cells are there."""
    centred = {}
    for cell in r:
        group = [r[other] for other in pool_of("group", cell, r, batches)]
        if config.mean == "leave_one_out":
            others = [r[other] for other in pool_of("group", cell, r, batches) if other != cell]
            centred[cell] = r[cell] - mean_of(others) if others else 0.0
        else:
            centred[cell] = r[cell] - mean_of(list(r.values()) if config.mean == "global" else group)
    result = {}
    for cell in r:
        group = [r[other] for other in pool_of("group", cell, r, batches)]
        of = r if config.std == "group" or config.std_of == "raw" else centred
        if len(group) < 2 or max(group) - min(group) < 1e-6:
            result[cell] = 0.0
        elif config.std == "none":
            result[cell] = centred[cell]
        else:
            spread = std_of([of[other] for other in pool_of(config.std, cell, r, batches)], config.ddof)
            result[cell] = centred[cell] / (spread + config.eps)
    return result


def by_hand(values, applies, valid, weights, batches, config) -> np.ndarray:
    """Sections 2.3 and 2.4 in loops."""
    judged = {
        (p, m): [j for j in range(len(values)) if applies[j, p, m]]
        for p, m in product(range(valid.shape[0]), range(valid.shape[1]))
        if valid[p, m] and applies[:, p, m].any()
    }
    if config.mix == "sum_then_normalise":
        sums = {cell: sum(weights[j] * values[(j, *cell)] for j in judged[cell]) for cell in judged}
        u = one_reward(sums, config, batches)
    else:
        each = [
            one_reward({cell: values[(j, *cell)] for cell in judged if j in judged[cell]}, config, batches)
            for j in range(len(values))
        ]
        u = {
            cell: sum(weights[j] * each[j][cell] for j in rewards)
            / (sum(abs(weights[j]) for j in rewards) if config.rescale_weights else 1)
            for cell, rewards in judged.items()
        }
    if config.mix == "gdpo":
        flat = {p for p, _ in u if all(u[cell] == 0 for cell in u if cell[0] == p)}
        z = {}
        for cell in u:
            pool = [u[other] for other in pool_of("update", cell, u, batches)]
            z[cell] = 0.0 if cell[0] in flat else (u[cell] - mean_of(pool)) / (std_of(pool, config.ddof) + config.eps)
        u = z
    if config.shaping:
        power = 1 + config.shaping.gamma
        if config.shaping.order == "shape_then_norm" and config.mix == "sum_then_normalise":
            u = one_reward(sums, config.model_copy(update={"std": "none"}), batches)
        u = {cell: (abs(x) ** power) * (1 if x > 0 else -1) if x else 0.0 for cell, x in u.items()}
        if config.shaping.recentre:
            u = {cell: x - mean_of([u[other] for other in pool_of("group", cell, u, batches)]) for cell, x in u.items()}
        if config.shaping.order == "shape_then_norm":
            spreads = {cell: std_of([u[other] for other in pool_of(config.std, cell, u, batches)], 0) for cell in u}
            u = {cell: x / (spreads[cell] + config.eps) for cell, x in u.items()}
    if config.clip:
        u = {cell: min(max(x, -config.clip), config.clip) for cell, x in u.items()}
    result = np.zeros(valid.shape)
    for cell, x in u.items():
        result[cell] = x
    return result


def named(config: AdvantageConfig) -> str:
    shaping = config.shaping
    extra = f" {shaping.order} {shaping.recentre} {config.clip}" if shaping else f" {config.std_of} {config.ddof}"
    return f"{config.mix} {config.mean}/{config.std}{extra}"


def advantages(given: dict[str, np.ndarray], config: AdvantageConfig, **more) -> np.ndarray:
    """What `credit` gives, before its rounding to fp32 where there is no shaping."""
    return linear(**given, config=config) if not config.shaping else credit(**given, config=config, **more).advantages


@each(
    ("of", "spread", "first"),
    [("raw", 0.269258, [-1.114172, -0.371391, 0, 1.485563]), ("centred", 0.180278, [-1.6641, -0.5547, 0, 2.2188])],
)
@each("std", ["global", "batch"])
def test_the_deviation_is_of_raw_or_of_centred_rewards(std, of, spread, first):
    a = linear(**single(GOLDEN), config=AdvantageConfig(std=std, std_of=of, eps=1e-8))
    np.testing.assert_allclose(a, [first, [0, 0, 0, 0]], atol=1e-4 if of == "centred" else 1e-6)
    assert 0.4 / a[0, 3] == pytest.approx(spread, abs=1e-6)


@each(
    ("order", "first"),
    [
        ("norm_then_shape", [-1.176057, -0.226332, 0, 1.810658]),
        # .3^1.5, .1^1.5, .4^1.5 = .164317, .031623, .252982 over their deviation: (.0115 - .007130^2)^.5 = .107001
        ("shape_then_norm", [-1.535660, -0.295538, 0, 2.364303]),
    ],
)
def test_slas_of_the_example(order, first):
    config = AdvantageConfig(std="batch", eps=1e-8, shaping=Slas(gamma=0.5, order=order))
    got = credit(**single(GOLDEN), config=config)
    np.testing.assert_allclose(got.advantages, [first, [0, 0, 0, 0]], atol=2e-6)
    if order == "norm_then_shape":
        assert got.metrics["advantage/sum"] == pytest.approx(0.408268 / 2, abs=1e-6)
    assert got.metrics["advantage/gamma"] == 0.5


@pytest.mark.filterwarnings("error")
@each("masked", [0.0, 0.3, 0.8])
@each("config", EVERY)
def test_linear_advantages_are_those_computed_one_by_one(config, masked):
    for seed in range(2):
        given = example(seed, masked)
        np.testing.assert_allclose(linear(**given, config=config), by_hand(**given, config=config), 1e-9, 1e-9)


@pytest.mark.filterwarnings("error")
@each("masked", [0.0, 0.3])
@each("config", SHAPED)
def test_shaped_advantages_are_those_computed_one_by_one(config, masked):
    given = example(2, masked)
    got = credit(**given, config=config)
    np.testing.assert_allclose(got.advantages, by_hand(**given, config=config), 1e-5, 1e-5)
    assert (np.abs(got.advantages) <= (config.clip or np.inf) * (1 + 1e-6)).all()


@each("std", STDS)
@each("mix", ["sum_then_normalise", "normalise_then_sum"])
@each("mean", ["group", "leave_one_out"])
def test_linear_advantages_of_a_group_sum_to_zero(mean, mix, std):
    given = example(0, 0.2)
    a = linear(**given, config=AdvantageConfig(mean=mean, std=std, mix=mix))
    np.testing.assert_allclose(a.sum(1), 0, atol=1e-12)
    assert np.abs(a).max() > 0.01


def test_the_batch_is_the_whole_step_under_either_name_and_an_update_its_own_share():
    given = example()
    step, batch, update = (linear(**given, config=AdvantageConfig(std=std)) for std in ("global", "batch", "update"))
    np.testing.assert_array_equal(step, batch)
    assert np.abs(update - batch).max() > 0.05
    ratio = update[given["batches"] == 0] / batch[given["batches"] == 0]  # one factor for all samples of an update
    assert np.ptp(ratio[np.isfinite(ratio)]) < 1e-9


def test_weights_as_given_multiply_z_scores_as_dancegrpo_has_them():
    """Two rewards that agree, z-scores -1 and 1: .7 + 1.4 = 2.1 as given, and 1 where they are scaled to sum to 1."""
    values = np.stack([[[0.2, 0.4]] * 2, [[0.1, 0.9]] * 2])
    given = single(values[0]) | {"values": values, "applies": np.ones((2, 2, 2), bool), "weights": np.array([0.7, 1.4])}
    for rescaled, size in ((True, 1.0), (False, 2.1)):
        config = AdvantageConfig(mix="normalise_then_sum", rescale_weights=rescaled, eps=1e-12)
        np.testing.assert_allclose(linear(**given, config=config), size * np.array([[-1.0, 1.0]] * 2))
    given["applies"][0] = False  # a reward that does not judge leaves the other its own weight, as given
    config = AdvantageConfig(mix="normalise_then_sum", rescale_weights=False, eps=1e-12)
    np.testing.assert_allclose(linear(**given, config=config), 1.4 * np.array([[-1.0, 1.0]] * 2))


def test_gdpo_has_mean_zero_and_deviation_one_over_each_batch():
    given = example()
    a = linear(**given, config=AdvantageConfig(mix="gdpo", eps=1e-12))
    for label in (0, 1):
        batch = a[given["batches"] == label]
        assert batch.mean() == pytest.approx(0, abs=1e-12) and batch.std() == pytest.approx(1)


@each("mix", MIXES)
def test_a_constant_added_to_a_prompts_rewards_changes_nothing(mix):
    given = example(0, 0.2)
    shifted = given | {"values": given["values"] + np.arange(2.0 * P).reshape(2, P, 1)}
    for std, of in (("group", "raw"), ("batch", "centred"), ("update", "centred"), ("none", "raw")):
        config = AdvantageConfig(std=std, std_of=of, mix=mix)
        np.testing.assert_allclose(linear(**shifted, config=config), linear(**given, config=config), atol=1e-9)
    rewards = given["values"][0]
    for std in ("batch", "update"):  # raw deviations feel differences between prompts, but no common shift
        first, second = (single(x, given["valid"], given["batches"]) for x in (rewards, rewards + 7))
        config = AdvantageConfig(std=std, mix=mix)
        np.testing.assert_allclose(linear(**first, config=config), linear(**second, config=config), atol=1e-9)


@each("shaping", [None, Slas(), Slas(order="shape_then_norm")])
@each("std", ["global", "batch"])
@each("mix", MIXES)
def test_the_scale_of_rewards_changes_nothing_when_eps_vanishes(mix, std, shaping):
    given = example()
    config = AdvantageConfig(std=std, mix=mix, shaping=shaping, eps=1e-15)
    scaled = given | {"values": 37 * given["values"]}
    np.testing.assert_allclose(advantages(scaled, config), advantages(given, config), rtol=1e-6)


def test_only_normalise_then_sum_gives_each_reward_its_weight_whatever_its_range():
    given = example() | {"weights": np.array([1.0, 1.0])}
    narrow = given | {"values": given["values"] * np.array([1.0, 1e-2])[:, None, None]}
    for mix, same in (("normalise_then_sum", True), ("gdpo", True), ("sum_then_normalise", False)):
        config = AdvantageConfig(mix=mix, eps=1e-12)
        assert np.allclose(linear(**narrow, config=config), linear(**given, config=config), rtol=1e-6) == same


@each("order", ["norm_then_shape", "shape_then_norm"])
def test_shaping_with_gamma_zero_is_the_batch_deviation(order):
    given = example(0, 0.2)
    config = AdvantageConfig(std="batch", std_of="centred", eps=1e-12)
    shaped = config.model_copy(update={"shaping": Slas(gamma=0, order=order)})
    np.testing.assert_allclose(credit(**given, config=shaped).advantages, linear(**given, config=config), 1e-6, 1e-6)


@each("gamma", [0.25, 1.0, 3.0])
@each("order", ["norm_then_shape", "shape_then_norm"])
def test_shaping_keeps_signs_and_order_and_favours_the_large(order, gamma):
    given = single(np.random.default_rng(3).uniform(size=(P, M)))
    config = AdvantageConfig(std="batch", shaping=Slas(gamma=gamma, order=order))
    u, a = linear(**given, config=config), credit(**given, config=config).advantages
    assert (np.sign(a) == np.sign(u)).all() and (np.argsort(a.ravel()) == np.argsort(u.ravel())).all()
    rise = np.argsort(np.abs(u.ravel()))
    assert (np.diff((np.abs(a) / np.abs(u)).ravel()[rise]) > 0).all()


def test_the_given_gamma_stands_in_for_the_adaptive_one():
    given = example()
    adaptive, fixed = (AdvantageConfig(std="batch", shaping=Slas(gamma=gamma)) for gamma in ("adaptive", 0.8))
    got, expected = credit(**given, config=adaptive, gamma=0.8), credit(**given, config=fixed)
    np.testing.assert_array_equal(got.advantages, expected.advantages)
    assert got.metrics == expected.metrics and got.metrics["advantage/gamma"] == 0.8


def test_recentred_groups_sum_to_zero_and_others_do_not():
    given = example(0, 0.2)
    plain, centred = (
        credit(**given, config=AdvantageConfig(std="batch", shaping=Slas(recentre=recentre)))
        for recentre in (False, True)
    )
    np.testing.assert_allclose(centred.advantages.sum(1), 0, atol=1e-5)
    assert centred.metrics["advantage/sum"] < 1e-12 < 0.02 < plain.metrics["advantage/sum"]
    assert plain.metrics["advantage/sum"] == pytest.approx(np.abs(plain.advantages.sum(1)).mean(), abs=1e-6)


def test_clip_bounds_what_is_far_and_leaves_the_rest():
    given = example()
    free, clipped = (credit(**given, config=AdvantageConfig(clip=clip)).advantages for clip in (None, 1.0))
    assert (np.abs(free) > 1).any()
    np.testing.assert_array_equal(clipped, np.clip(free, -1, 1))


@each("config", EVERY[::3] + SHAPED[::5])
def test_the_order_of_groups_and_members_changes_nothing(config):
    given = example(0, 0.2)
    rng = np.random.default_rng(9)
    rows, columns = rng.permutation(P), rng.permutation(M)
    moved = {name: x if name == "weights" else x[..., rows, :][..., columns] for name, x in given.items()}
    np.testing.assert_allclose(advantages(moved, config), advantages(given, config)[rows][:, columns], 1e-6, 1e-9)


@pytest.mark.filterwarnings("error")
@each("noise", [0.0, 1e-16, 3e-7])
@each("config", EVERY[::2] + SHAPED[::3])
def test_a_flat_group_gets_exactly_zero(config, noise):
    given = example()
    given["values"][:, 1] += noise * np.arange(M) / M
    given["weights"] = np.array([1.0, -0.5])
    a = credit(**given, config=config.model_copy(update={"eps": 1e-12})).advantages
    assert (a[1] == 0).all() and np.isfinite(a).all() and (a[[0, 2, 3, 4]] != 0).all()


@pytest.mark.filterwarnings("error")
@each("config", EVERY[::3] + SHAPED[::5])
def test_masked_rewards_count_nowhere_and_get_zero(config):
    given = example(0, 0.3)
    spoiled = given | {"values": np.where(given["applies"] & given["valid"], given["values"], 1e300)}
    got, expected = (credit(**x, config=config, conditions=2, gamma=0.5) for x in (spoiled, given))
    np.testing.assert_array_equal(got.advantages, expected.advantages)
    assert got.metrics == expected.metrics and np.isfinite(list(got.metrics.values())).all()
    assert (got.advantages[~given["valid"]] == 0).all() and (got.valid == given["valid"]).all()


@pytest.mark.filterwarnings("error")
@each("config", EVERY[::3] + SHAPED[::5])
def test_groups_with_fewer_than_two_valid_rewards_and_steps_without_any_are_zero(config):
    given = example()
    given["valid"][2], given["valid"][3] = False, np.arange(M) == 3
    a = credit(**given, config=config).advantages
    assert (a[2:4] == 0).all() and (a[0] != 0).all()
    nothing = credit(**given | {"valid": np.zeros((P, M), bool)}, config=config, conditions=3)
    assert (nothing.advantages == 0).all() and nothing.metrics["group/masked"] == 1


def test_a_sample_that_no_reward_judges_is_masked():
    given = example()
    given["applies"][:, 4, 2] = False
    got = credit(**given, config=AdvantageConfig(std="global"))
    assert not got.valid[4, 2] and got.valid.sum() == P * M - 1 and got.advantages[4, 2] == 0
    masked = example()
    masked["valid"][4, 2] = False
    np.testing.assert_array_equal(got.advantages, credit(**masked, config=AdvantageConfig(std="global")).advantages)


def test_leave_one_out_is_the_distance_to_the_mean_of_the_others():
    rewards, valid = example()["values"][0], np.ones((P, M), bool)
    valid[0, 2] = valid[4, 3:] = False
    config, zeros = AdvantageConfig(mean="leave_one_out", std="none"), np.zeros((P, M), int)
    a = normalise(rewards, valid, config, zeros)
    for p, m in product([0, 2, 3, 4], range(M)):
        if valid[p, m]:
            others = [rewards[p, n] for n in range(M) if valid[p, n] and n != m]
            assert a[p, m] == pytest.approx(rewards[p, m] - np.mean(others), abs=1e-12)
    centred = normalise(rewards, valid, config.model_copy(update={"mean": "group"}), zeros)
    np.testing.assert_allclose(a[4], centred[4] * 3 / 2, atol=1e-12)


def test_credit_reports_the_spread_of_groups_and_the_share_that_teaches_nothing():
    given = single([[0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [2.0, 2.0, 2.5, 2.5]])
    learned = credit(**given, config=AdvantageConfig(eps=1e-12))
    assert learned.advantages.dtype == np.float32 and learned.advantages.shape == learned.valid.shape == (3, 4)
    expected = {"group/reward_std_mean": 0.25, "group/zero_std_ratio": 1 / 3}
    assert learned.metrics == pytest.approx(expected | {"group/masked": 0, "advantage/abs_mean": 8 / 12})
    given["valid"][0, :2] = False
    masked = credit(**given, config=AdvantageConfig(eps=1e-12))
    np.testing.assert_allclose(masked.advantages[0], [0, 0, -1, 1])
    assert masked.metrics == pytest.approx(expected | {"group/masked": 2 / 12, "advantage/abs_mean": 6 / 10})


@each("masked", [0.0, 0.4])
def test_variance_is_split_across_noises_conditions_and_their_kinds(masked):
    k, g = 3, 4
    rng = np.random.default_rng(5)
    rewards, valid = rng.uniform(size=(P, k * g)), rng.uniform(size=(P, k * g)) >= masked
    rewards[:, g:] += 2  # as if perturbed prompts scored better
    metrics = credit(**single(rewards, valid), config=AdvantageConfig(), conditions=k).metrics

    def cells(p, conditions, noises):
        return [rewards[p, c * g + n] for c, n in product(conditions, noises) if valid[p, c * g + n]]

    def spread(families):
        return mean_of([std_of(numbers) for numbers in families if len(numbers) > 1])

    expected = {
        "group/reward_std_mean": spread([cells(p, range(k), range(g)) for p in range(P)]),
        "group/std_across_noises": spread([cells(p, [c], range(g)) for p in range(P) for c in range(k)]),
        "group/std_across_conditions": spread([cells(p, range(k), [n]) for p in range(P) for n in range(g)]),
        "group/original_std": spread([cells(p, [0], range(g)) for p in range(P)]),
        "group/perturbed_std": spread([cells(p, [1, 2], range(g)) for p in range(P)]),
        "group/original_mean": mean_of(sum((cells(p, [0], range(g)) for p in range(P)), [])),
        "group/perturbed_mean": mean_of(sum((cells(p, [1, 2], range(g)) for p in range(P)), [])),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    unanchored = credit(**single(rewards, valid), config=AdvantageConfig(), conditions=k, anchor=False).metrics
    assert not {"group/original_std", "group/original_mean"} & unanchored.keys()
    assert unanchored["group/perturbed_mean"] == pytest.approx(rewards[valid].mean())
    assert unanchored["group/std_across_conditions"] == metrics["group/std_across_conditions"]
    assert metrics["group/std_across_conditions"] > 2 * metrics["group/std_across_noises"]


@each(
    "wrong",
    [{"gamma": -0.1}, {"gamma": "auto"}, {"gamma": float("inf")}, {"ema": 1.0}, {"refresh": 0}, {"delta": 0.0}],
)
def test_settings_of_slas_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        AdvantageConfig.model_validate({"shaping": {"kind": "slas", **wrong}})


@pytest.mark.filterwarnings("error")
@each("broken", [None, np.nan, np.inf, -np.inf, 1e300, -1e31])
@each("config", EVERY + SHAPED)
def test_a_masked_sample_contributes_nothing_and_a_score_that_is_no_number_masks(config, broken):
    """A group with such a sample has the advantages and metrics of the group without it. None: a reward has failed."""
    given = example(4)
    given = {name: x if name == "weights" else x[..., :1, :] for name, x in given.items()}
    out, kept = 2, [0, 1, 3, 4, 5]
    expected = credit(**{name: x if name == "weights" else x[..., kept] for name, x in given.items()}, config=config)
    if broken is None:
        given["valid"] = given["valid"] & (np.arange(M) != out)
    else:
        given["values"][1, 0, out] = broken
    got = credit(**given, config=config)
    assert got.valid[0].tolist() == [member != out for member in range(M)] and got.advantages[0, out] == 0
    np.testing.assert_allclose(got.advantages[:, kept], expected.advantages, 1e-6, 1e-7)
    assert got.metrics.pop("group/masked") == pytest.approx(1 / M) and expected.metrics.pop("group/masked") == 0
    assert got.metrics == pytest.approx(expected.metrics)


def test_a_large_score_is_compared_as_its_group_has_it_and_weights_count():
    """One outlier leaves the others equal, and a weight that carries a score past the bound masks its sample."""
    rewards = np.array([[0.1, 0.5, 0.9, 1e29]])
    found = credit(**single(rewards), config=AdvantageConfig(eps=1e-9))
    np.testing.assert_allclose(found.advantages, [[-1, -1, -1, 3]] / np.sqrt(3), rtol=1e-6)
    assert found.valid.all()
    assert not credit(**(single(rewards) | {"weights": np.array([-100.0])}), config=AdvantageConfig()).valid[0, 3]


def test_a_reward_that_does_not_judge_a_prompt_may_say_anything_of_it():
    given = example()
    assert not given["applies"][1, 3].any()
    given["values"][1, 3] = np.inf
    assert credit(**given, config=AdvantageConfig()).valid.all()
