import numpy as np
import pytest
import torch
from pydantic import ValidationError

from align_cluster.algorithms.base import Batch, Policy, RecordedSteps
from align_cluster.algorithms.srpo import LEVELS, NEGATIVE, POSITIVE, SRPO
from align_cluster.backbones.levels import ddim_levels, linear_sigmas
from align_cluster.rollouts.denoise import starting_noise
from align_cluster.rollouts.steps import STEPS

SHAPE = (2, 3, 3)
SEEDS = (11, 12, 13)


class Linear(Policy):
    """A velocity that can be set from outside, and a reward that is linear in the latents: f . C(text).

    `bias` is what the reward likes whatever the text. Texts get unit vectors of their own.
    """

    def __init__(self, output="perfect", bias=0.0, prediction="flow"):
        self.output, self.asked, self.fed = output, [], []
        kind = STEPS["euler"]
        levels = linear_sigmas(4, 3.0) if prediction == "flow" else ddim_levels(4)
        self.step = kind(kind.Config(), levels, prediction)
        self.leaf = torch.zeros(len(SEEDS), *SHAPE, requires_grad=True)  # added to each sample's output
        generator = torch.Generator().manual_seed(5)
        self.bias = bias * torch.randn(SHAPE, generator=generator)

    def velocity(self, x, sigma, adapter="default"):
        self.fed.append(sigma)
        times = len(x) // len(SEEDS)
        output = starting_noise(SEEDS, SHAPE) - X0 if isinstance(self.output, str) else self.output
        return (self.leaf + output).repeat(times, 1, 1, 1)

    def embedding(self, text):
        generator = torch.Generator().manual_seed(sum(map(ord, text)) % 1000)
        return torch.randn(SHAPE, generator=generator) + self.bias

    def rewards(self, latents, texts):
        self.asked.append(texts)
        known = torch.stack([torch.stack([self.embedding(text) for text in own]) for own in texts])
        return (latents[:, None] * known).flatten(2).sum(2)


FIRST = torch.zeros(len(SEEDS), dtype=torch.int64)  # each sample's first injection
X0 = torch.randn(len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(3))


def batch(*passes, update=0, noises=SEEDS, prompts=("a cat",) * 3):
    """The samples in one inner pass (the first, unless another is given), or in several that are folded into one."""
    passes = passes or (0,)
    visits = [(seed, number) for number in passes for seed in SEEDS]

    def generators(purpose, *, shared=False):
        numbers = (seed * 1000 + len(purpose) + (0 if shared else 100 * number) for seed, number in visits)
        return [torch.Generator().manual_seed(number) for number in numbers]

    return Batch(
        passes=tuple(number for _, number in visits),
        update=update,
        advantages=torch.zeros(len(visits)),
        x0=X0.repeat(len(passes), 1, 1, 1),
        sigmas=linear_sigmas(4, 3.0),
        recorded=RecordedSteps(indices=torch.empty(len(visits), 0, dtype=torch.int64)),
        generators=generators,
        prompts=prompts * len(passes),
        noises=noises * len(passes),
    )


def made(**settings):
    return SRPO(SRPO.Config(**{"margin": None, **settings}))


def gradient(algorithm, inner_pass, policy=None):
    policy = policy or Linear()
    loss, _ = algorithm.loss(policy, batch(inner_pass))
    return torch.autograd.grad(loss.sum(), policy.leaf)[0]


def test_levels_are_those_of_the_official_code():
    """linspace(sig50[5], sig50[25], 1000)[1000 - m] with sig50 the 50-step schedule of shift 3."""
    sigmas = linear_sigmas(50, 3.0)
    assert SRPO.Config().levels == pytest.approx((sigmas[5], sigmas[25]), abs=1e-12)
    official = np.linspace(sigmas[5], sigmas[25], 1000)
    numbers = torch.tensor([1, 5, 500, 995, 1000])
    torch.testing.assert_close(made().level(numbers), torch.from_numpy(official[1000 - numbers.numpy()]).float())
    assert official[0] - official[100] == pytest.approx(0.0215, abs=1e-4)  # the largest gap


def test_each_branch_starts_and_recovers_at_the_officials_level_numbers():
    """k = min(T - m, 100, m); denoise from m + k to m; invert from max(m - k, 1) to k above that."""
    numbers = torch.tensor([5, 6, 50, 99, 100, 101, 102, 500, 899, 900, 901, 950, 995])
    start, end = made().places(numbers, torch.zeros(len(numbers), dtype=torch.bool))
    assert start.tolist() == [10, 12, 100, 198, 200, 201, 202, 600, 999, 1000, 1000, 1000, 1000]
    assert end.tolist() == numbers.tolist()
    start, end = made().places(numbers, torch.ones(len(numbers), dtype=torch.bool))
    assert start.tolist() == [1, 1, 1, 1, 1, 1, 2, 400, 799, 800, 802, 900, 990]
    assert end.tolist() == [6, 7, 51, 100, 101, 101, 102, 500, 899, 900, 901, 950, 995]


class Curved(Linear):
    """A network whose output depends on the noisy latents, on the level that it is fed, and on a leaf."""

    def velocity(self, x, sigma, adapter="default"):
        return torch.tanh(0.7 * x + self.leaf) * (1 + sigma).view(-1, 1, 1, 1)


def official(m, branch, row, policy):
    """Loss of one sample without margin, and its gradient to the leaf, in fp64 numpy from the written formulas."""
    schedule = [3 * t / (1 + 2 * t) for t in 1 - np.arange(51) / 50]
    levels = np.linspace(schedule[5], schedule[25], 1000).astype(np.float32)
    k = min(1000 - m, 100, m)
    low = m if branch == "denoise" else max(m - k, 1)
    clean, noisy = levels[1000 - low], levels[1000 - (low + k)]
    begin, end = (noisy, clean) if branch == "denoise" else (clean, noisy)
    fed, begin, end = int(np.float32(1000) * begin) / 1000, float(begin), float(end)
    x0, eps = X0[row].double().numpy(), starting_noise(SEEDS, SHAPE)[row].double().numpy()
    x = (1 - begin) * x0 + begin * eps
    inner = np.tanh(0.7 * x)
    recovered = (x + (end - begin) * inner * (1 + fed) - end * eps) / (1 - end)
    plus, minus = (policy.embedding(f"{word}. a cat").double().numpy() for word in ("Detail", "Painting"))
    if branch == "denoise":
        taste = (1 + np.linspace(0.1, 0.25, 1000)[m]) * plus - minus
    else:
        taste = (1 + np.linspace(0.3, 0.01, 1000)[low]) * minus - plus
    return -(recovered * taste).sum(), -taste * (end - begin) / (1 - end) * (1 - inner**2) * (1 + fed)


@pytest.mark.parametrize("numbers", [(5, 50, 99), (100, 101, 102), (500, 640, 899), (900, 901, 995)])
def test_loss_and_gradient_are_those_of_the_written_formulas_in_both_branches_at_every_level(numbers):
    class At(SRPO):
        def numbers(self, batch, injection):
            return torch.tensor(numbers)

    for inner_pass, branch in enumerate(("denoise", "inversion")):
        policy, algorithm = Curved(bias=1.0), At(SRPO.Config(margin=None))
        loss, _ = algorithm.loss(policy, batch(inner_pass))
        slope = torch.autograd.grad(loss.sum(), policy.leaf)[0]
        for row, m in enumerate(numbers):
            wanted, wanted_slope = official(m, branch, row, policy)
            assert loss[row].item() == pytest.approx(wanted, rel=2e-5, abs=2e-4)
            np.testing.assert_allclose(slope[row].numpy(), wanted_slope, rtol=1e-3, atol=1e-5)


def test_both_branches_recover_at_one_level_from_either_side_of_it():
    algorithm, policy = made(truncate_timesteps=False), Linear()
    for inner_pass in (0, 1):
        algorithm.loss(policy, batch(inner_pass))
    target = algorithm.level(algorithm.numbers(batch(), FIRST))
    above, below = policy.fed
    assert (above > target).all() and (below < target).all()
    assert (above - target).max() < 0.0216 and (target - below).max() < 0.0216


def test_a_perfect_network_recovers_its_own_x0_whatever_the_branch():
    for inner_pass in (0, 1):
        _, metrics = made().loss(Linear(), batch(inner_pass))
        assert metrics["recovery"].max() < 1e-4


def test_the_noise_is_the_rollouts_own_and_another_noise_does_not_recover():
    _, right = made().loss(Linear(), batch())
    _, wrong = made().loss(Linear(), batch(noises=(1, 2, 3)))
    assert right["recovery"].max() < 1e-4 < 0.1 < wrong["recovery"].min()


def test_the_network_is_fed_whole_thousandths():
    for truncate, whole in ((True, True), (False, False)):
        policy = Linear()
        made(truncate_timesteps=truncate).loss(policy, batch())
        assert bool(((1000 * policy.fed[0]) % 1 < 1e-3).all()) == whole


def test_gradients_of_the_two_branches_cancel_what_is_common_to_the_words():
    """S3: equal gaps, k_A = k_B and C+ == C-: the reward's own taste pushes up in one and down in the other."""
    settings = {"discount_denoise": (0.2, 0.2), "discount_inversion": (0.2, 0.2), "positive": ["x"], "negative": ["x"]}
    algorithm = made(**settings)
    a, b = (gradient(algorithm, inner_pass) for inner_pass in (0, 1))
    assert a.abs().max() > 1e-3
    torch.testing.assert_close(a, -b, rtol=1e-3, atol=1e-5)


def test_gradients_of_the_two_branches_add_up_along_the_difference_of_the_words():
    algorithm, policy = made(form="difference"), Linear(bias=3.0)
    a, b = (gradient(algorithm, inner_pass, Linear(bias=3.0)) for inner_pass in (0, 1))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    difference = policy.embedding("Detail. a cat") - policy.embedding("Painting. a cat")
    push = -a[0]  # on the output, which the image follows with the other sign
    assert torch.nn.functional.cosine_similarity(push.flatten(), -difference.flatten(), dim=0) > 0.999


def test_without_a_discount_the_released_form_is_the_difference():
    """S4."""
    nothing = {"discount_denoise": (0.0, 0.0), "discount_inversion": (0.0, 0.0)}
    for inner_pass in (0, 1):
        torch.testing.assert_close(gradient(made(**nothing), inner_pass), gradient(made(form="difference"), inner_pass))


def test_with_equal_words_the_released_form_is_the_reward_times_its_discount():
    """S5, in both branches."""
    algorithm = made(positive=["x"], negative=["x"], discount_denoise=(0.3, 0.3), discount_inversion=(0.7, 0.7))
    for inner_pass, k in ((0, 0.3), (1, 0.7)):
        policy = Linear()
        _, metrics = algorithm.loss(policy, batch(inner_pass))
        plain = policy.rewards(X0, [["x. a cat"]] * 3)[:, 0]
        torch.testing.assert_close(metrics["reward"], k * plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["released", "difference", "cfg"])
def test_the_forms_weigh_the_two_scores_as_the_paper_and_the_code_do(form):
    algorithm = made(form=form, strength=2.5)
    numbers = torch.tensor([5, 400, 995])
    k_a, k_b = np.linspace(0.1, 0.25, LEVELS)[numbers], np.linspace(0.3, 0.01, LEVELS)[numbers]
    plus, minus = {
        "released": ((1 + k_a, -1 + 0 * k_a), (-1 + 0 * k_b, 1 + k_b)),
        "difference": ((1, -1), (-1, 1)),
        "cfg": ((2.5, -1.5), (-1.5, 2.5)),
    }[form]
    for inverts, expected in ((False, plus), (True, minus)):
        wanted = torch.stack([torch.as_tensor(np.broadcast_to(side, 3).copy()).float() for side in expected], 1)
        torch.testing.assert_close(algorithm.weights(numbers, torch.full((3,), inverts)), wanted)


def test_each_branch_reads_its_discount_where_the_official_code_does():
    """discount_pos[m] at the level that is recovered, discount_inv[m_B] at the one that was noised."""
    algorithm = made(positive=["x"], negative=["x"], discount_denoise=(0.0, 1.0), discount_inversion=(0.0, 1.0))
    number = algorithm.numbers(batch(), FIRST)
    gap = torch.minimum(torch.minimum(number, LEVELS - number), torch.tensor(100))
    for inner_pass, place in ((0, number), (1, (number - gap).clamp(min=1))):
        policy = Linear()
        _, metrics = algorithm.loss(policy, batch(inner_pass))
        k = torch.linspace(0, 1, LEVELS)[place]
        plain = policy.rewards(X0, [["x. a cat"]] * 3)[:, 0]
        torch.testing.assert_close(metrics["reward"], k * plain, rtol=1e-3, atol=1e-3)


def test_gradients_stop_at_the_margin_and_nowhere_else():
    """S6."""
    reward = made().loss(Linear(), batch())[1]["reward"]
    low, high = reward.min().item() - 1, reward.max().item() + 1
    loss, metrics = made(margin=low).loss(Linear(), batch())
    assert (loss == 0).all() and (metrics["satisfied"] == 1).all()
    assert (gradient(made(margin=low), 0) == 0).all()
    loss, metrics = made(margin=high).loss(Linear(), batch())
    torch.testing.assert_close(loss, high - reward)
    assert (metrics["satisfied"] == 0).all()
    torch.testing.assert_close(gradient(made(margin=high), 0), gradient(made(), 0))


def test_one_pair_of_words_an_update_each_list_in_its_own_cycle():
    algorithm = made()
    pairs = [algorithm.pair(update, "a cat") for update in range(20)]
    assert pairs[0] == ["Detail. a cat", "Painting. a cat"] and pairs[4][0] == pairs[0][0]
    assert pairs[6] == ["Real. a cat", "Anime. a cat"]
    assert len({tuple(pair) for pair in pairs}) == len(POSITIVE) * len(NEGATIVE)
    policy = Linear()
    algorithm.loss(policy, batch(update=6))
    assert policy.asked == [[pairs[6]] * 3]


def test_words_come_in_the_officials_order_which_counts_steps_from_one():
    positive = ("Natural-lighting", "Detail", "Detailed", "Real")
    negative = ("Concept art", "Painting", "Anime", "Flat", "Oil")
    for update in range(40):
        official = [f"{words[(update + 1) % len(words)]}. a cat" for words in (positive, negative)]
        assert made().pair(update, "a cat") == official


def test_a_template_says_where_the_words_go():
    algorithm = made(template="{prompt}, {word}", positive=["on snow"])
    assert algorithm.pair(0, "a cat")[0] == "a cat, on snow"
    assert algorithm.pair(0, "a sign that says {word}")[0] == "a sign that says {word}, on snow"


def test_plain_direct_align_follows_the_prompts_own_reward():
    algorithm, policy = made(relative="none", branches="denoise"), Linear()
    loss, metrics = algorithm.loss(policy, batch())
    assert policy.asked == [[["a cat"]] * 3] and algorithm.inner_passes(25, 0) == 1 and "preference" not in metrics
    torch.testing.assert_close(-loss, policy.rewards(X0, [["a cat"]] * 3)[:, 0], rtol=1e-3, atol=1e-3)


def test_a_reward_that_reads_no_text_compares_an_image_with_itself_under_a_little_noise():
    policy = Linear()
    _, metrics = made(relative="noise", form="difference", blur=0.2).loss(policy, batch())
    assert policy.asked == [[["a cat"]] * 3] * 2
    # The noised latents have .8 of the image, and noise whose reward is 0 in the mean.
    plain = policy.rewards(X0, [["a cat"]] * 3)[:, 0]
    noise = torch.stack([torch.randn(SHAPE, generator=stream) for stream in batch().generators("blur")])
    wanted = plain - policy.rewards(0.8 * X0 + 0.2 * noise, [["a cat"]] * 3)[:, 0]
    torch.testing.assert_close(metrics["preference"], wanted, rtol=1e-3, atol=1e-3)


def test_several_injections_take_consecutive_levels_and_weigh_late_ones_less():
    algorithm = made(injections=3, branches="denoise", form="difference", late=(0.1, 1.0))
    assert algorithm.inner_passes(25, 0) == 3
    first, second, third = (algorithm.numbers(batch(), torch.full((3,), injection)) for injection in range(3))
    assert (first - second == 100).all() and (second - third == 100).all()
    assert (third >= 5).all() and (first <= 995).all()
    plain = made(injections=3, branches="denoise", form="difference")
    for inner_pass, number in enumerate((first, second, third)):
        weight = 0.1 + 0.9 * (number - 1) / (LEVELS - 1)
        torch.testing.assert_close(
            gradient(algorithm, inner_pass),
            weight.view(-1, 1, 1, 1) * gradient(plain, inner_pass),
            rtol=1e-4,
            atol=1e-6,
        )


FOLDED = [
    {},
    {"injections": 3, "gap": 200, "late": (0.1, 1.0)},
    {"injections": 2, "form": "cfg", "strength": 2.5, "margin": 3.0},
    {"relative": "noise", "form": "difference", "blur": 0.2},
    {"relative": "none", "branches": "denoise", "injections": 4},
]


@pytest.mark.parametrize("settings", FOLDED)
def test_folded_passes_are_the_single_ones_row_by_row_in_both_branches_and_all_injections(settings):
    algorithm, texts = made(**settings), ("a cat", "a dog", "two birds")
    passes = range(algorithm.inner_passes(25, 0))
    for numbers in (passes, passes[1:], passes[::-1]):
        policy = Linear(output=0.1)
        folded, metrics = algorithm.loss(policy, batch(*numbers, prompts=texts))
        slope = torch.autograd.grad(folded.sum(), policy.leaf)[0]
        single, found, slopes = [], [], []
        for number in numbers:
            alone = Linear(output=0.1)
            loss, values = algorithm.loss(alone, batch(number, prompts=texts))
            single.append(loss), found.append(values)
            slopes.append(torch.autograd.grad(loss.sum(), alone.leaf)[0])
        torch.testing.assert_close(folded, torch.cat(single), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slope, sum(slopes), rtol=1e-4, atol=1e-5)
        for name, values in metrics.items():
            torch.testing.assert_close(values, torch.cat([one[name] for one in found]), rtol=1e-5, atol=1e-5)
        assert folded.detach().unique().numel() > 1


def test_each_image_is_judged_under_the_words_of_its_own_text():
    algorithm, policy = made(), Linear()
    algorithm.loss(policy, batch(update=6, prompts=("a cat", "a dog", "two birds")))
    assert policy.asked == [[algorithm.pair(6, text) for text in ("a cat", "a dog", "two birds")]]


def test_levels_are_a_function_of_the_sample_and_not_of_its_batch():
    algorithm = made()
    numbers = algorithm.numbers(batch(), FIRST)
    assert len(set(numbers.tolist())) > 1 and torch.equal(numbers, algorithm.numbers(batch(1), FIRST))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_networks_that_predict_noise_take_the_same_two_branches(prediction):
    policy = Linear(prediction=prediction)
    for inner_pass in (0, 1):
        loss, _ = made(levels=(0.95, 0.7)).loss(policy, batch(inner_pass))
        assert torch.isfinite(torch.autograd.grad(loss.sum(), policy.leaf)[0]).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"template": "{word}"},
        {"template": "{word} {word} {prompt}"},
        {"levels": (0.7, 0.9)},
        {"levels": (1.0, 0.9)},
        {"positive": []},
        {"negative": [""]},
        {"injections": 20},
        {"gap": 0},
        {"form": "cfg", "strength": 0.9},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValidationError):
        SRPO.Config(**settings)
