"""E2PO's phase 2: what is drawn under perturbed conditions, and what the policy's own densities say of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import adapter_parameters
from align_cluster.backbones.levels import sd3_sigmas
from align_cluster.conditions.exploration import E2po
from align_cluster.prompts.groups import plan_step
from align_cluster.rollouts.denoise import initial_noise
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.schedule import Sd3Schedule
from align_cluster.rollouts.steps import Dpm2, Euler, FlowSde
from align_cluster.rollouts.windows import Window
from align_cluster.streams import stream
from align_cluster.types import Chunk, Perturbation, Prompt
from align_cluster.weights import publish

TEXT = "a photo of a red circle"
STEPS, RHO = 6, 0.4
NOISES, CONDITIONS = 2, 3
WEIGHTS = [1, 0.808, 0.547, 0.171, 0, 0]  # (sigma - .6) / .4 at SD3's six levels 1, .9233, .8189, .6683, .4322, .0089
SIZE = NOISES * CONDITIONS
ALL = tuple(range(STEPS))
ODE = DrawRequest(5, STEPS, Euler.Config(), schedule=Sd3Schedule.Config(), exploration=E2po(rho=RHO))
SDE = replace(ODE, step=FlowSde.Config(), window=Window(ALL, ALL[:-1], STEPS - 1), means=True)


def grid(chunk: int = SIZE) -> list[Chunk]:
    return plan_step([Prompt(0, TEXT)], 7, 0, 1, NOISES, chunk, CONDITIONS)


def originals(chunk: Chunk) -> Chunk:
    """The same members, all under the prompt's own condition."""
    return replace(chunk, rows=tuple(replace(row, variant=0) for row in chunk.rows))


@pytest.fixture(scope="module")
def sampler(settings):
    """A sampler that holds weights 5, far from the base model's."""
    made, rng = Sampler(settings), np.random.default_rng(0)
    shapes = {name: tuple(p.shape) for name, p in adapter_parameters(made.denoiser, "default").items()}
    made.adopt(*publish({name: (0.2 * rng.standard_normal(shape)).astype("f4") for name, shape in shapes.items()}, 5))
    return made


@pytest.fixture(scope="module")
def conditions(sampler):
    """The prompt's condition and the empty prompt's."""
    return sampler.encode([TEXT, ""])


@pytest.fixture(scope="module")
def perturbation(sampler):
    return sampler.perturb([TEXT], E2po(conditions=CONDITIONS, iterations=40), 0)[0]


@pytest.fixture(scope="module")
def explored(sampler, conditions, perturbation):
    """(images, record) of a group with noise at every step, its densities recorded."""
    return sampler.draw(grid()[0], {TEXT: conditions[0]}, None, SDE, {TEXT: perturbation})[1:]


def own_conditions(condition, perturbation):
    """(sequence, pooled) of each condition of the prompt, fp64: CLIP-L's slots replaced, all others as they were."""
    rows, width = perturbation.hidden.shape[1:]
    found = []
    for variant in range(CONDITIONS):
        sequence, pooled = condition.sequence.astype(np.float64), condition.pooled.astype(np.float64)
        if variant:
            sequence[:rows, :width] = perturbation.hidden[variant - 1]
            pooled[:width] = perturbation.pooled[variant - 1]
        found.append((sequence, pooled))
    return found


def blended(condition, perturbation, variant, sigma):
    """gamma C_k + (1 - gamma) C by the paper's formula, as fp32 arrays."""
    gamma = min(1, max(0, (sigma - (1 - RHO)) / RHO))
    everything = own_conditions(condition, perturbation)
    parts = zip(everything[variant], everything[0], strict=True)
    return [(gamma * own + (1 - gamma) * original).astype(np.float32) for own, original in parts]


def velocity(sampler, x, sigma, texts):
    """The network's output for latents [B, C, H, W] under (sequence, pooled) of each."""
    sequence, pooled = (torch.from_numpy(np.stack(part)) for part in zip(*texts, strict=True))
    with torch.no_grad():
        return sampler.backbone.velocity(sampler.denoiser, x, torch.full((len(x),), float(sigma)), sequence, pooled)


def sde_step(x, v, sigma, sigma_next, sigmas):
    """(mean, deviation) of Flow-GRPO's step at noise level .7, in fp64, written out."""
    x, v, dt = x.double(), v.double(), sigma_next - sigma
    std_t = 0.7 * (sigma / (1 - (sigma if sigma < 1 else sigmas[1]))) ** 0.5
    mean = x * (1 + std_t**2 / (2 * sigma) * dt) + v * (1 + std_t**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std_t * (-dt) ** 0.5


def assert_records_equal(first, second, names=("x0", "sigmas", "indices", "before", "after", "log_probs", "means")):
    for name in names:
        ours, theirs = getattr(first, name), getattr(second, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


# ------------------------------------------------------------------------------------------------ what the network sees


@pytest.fixture(params=[1.0, 3.0], ids=["no guidance", "guidance 3"])
def seen(request, sampler, conditions, perturbation):
    """What the network is fed in an ODE draw of a group: a list of (sequence, pooled), one a call."""
    calls = []
    handle = sampler.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (kwargs["encoder_hidden_states"].numpy().copy(), kwargs["pooled_projections"].numpy().copy())
        ),
        with_kwargs=True,
    )
    guided = replace(ODE, guidance=request.param)
    sampler.draw(
        grid()[0], {TEXT: conditions[0]}, conditions[1] if request.param > 1 else None, guided, {TEXT: perturbation}
    )
    handle.remove()
    if request.param > 1:  # every second call is the empty prompt's, which nothing perturbs
        for call in calls[1::2]:
            for fed, null in zip(call, (conditions[1].sequence, conditions[1].pooled), strict=True):
                np.testing.assert_array_equal(fed, np.stack([null] * SIZE))
        calls = calls[::2]
    assert len(calls) == STEPS
    return calls


def test_each_call_sees_the_blend_of_its_noise_level(seen, conditions, perturbation):
    for call, sigma, weight in zip(seen, sd3_sigmas(STEPS, 3.0), WEIGHTS, strict=False):
        assert min(1, max(0, (sigma - 0.6) / 0.4)) == pytest.approx(weight, abs=5e-4)
        for member, variant in enumerate(grid()[0].variants):
            expected = blended(conditions[0], perturbation, variant, sigma)
            for fed, wanted in zip(call, expected, strict=True):
                np.testing.assert_allclose(fed[member], wanted, rtol=0, atol=2e-6)


def test_the_ends_of_the_blend_are_exact(seen, conditions, perturbation):
    variants = np.array(grid()[0].variants)
    everything = own_conditions(conditions[0], perturbation)
    own = [np.stack([everything[k][part] for k in variants]).astype(np.float32) for part in (0, 1)]
    plain = [np.stack([everything[0][part]] * SIZE).astype(np.float32) for part in (0, 1)]
    for call, weight in zip(seen, WEIGHTS, strict=True):
        for fed, perturbed, original in zip(call, own, plain, strict=True):
            np.testing.assert_array_equal(fed[variants == 0], original[variants == 0])
            if weight in (0, 1):  # from sigma = 1 - rho down the network sees the prompt itself
                np.testing.assert_array_equal(fed, perturbed if weight else original)
            else:
                assert all((fed[i] != original[i]).any() and (fed[i] != perturbed[i]).any() for i in range(2, SIZE))


# ------------------------------------------------------------------------------------------------------- what is drawn


def test_an_explored_ode_draw_is_eulers_under_the_blended_conditions(sampler, conditions, perturbation):
    chunk, sigmas = grid()[0], sd3_sigmas(STEPS, 3.0)
    _, _, record = sampler.draw(chunk, {TEXT: conditions[0]}, None, ODE, {TEXT: perturbation})
    x = initial_noise([stream(n) for n in chunk.noises], sampler.backbone.latent_shape)
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        texts = [blended(conditions[0], perturbation, variant, sigma) for variant in chunk.variants]
        x = x + velocity(sampler, x, sigma, texts) * float(sigma_next - sigma)
    np.testing.assert_allclose(record.x0, x.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("request_", [ODE, SDE, replace(ODE, step=Dpm2.Config())], ids=["euler", "flow_sde", "dpm2"])
def test_originals_keep_their_bits_in_a_mixed_chunk_and_perturbed_ones_change(
    sampler, conditions, perturbation, request_
):
    chunk = grid()[0]
    _, images, mixed = sampler.draw(chunk, {TEXT: conditions[0]}, None, request_, {TEXT: perturbation})
    _, plain_images, plain = sampler.draw(originals(chunk), {TEXT: conditions[0]}, None, request_)
    np.testing.assert_array_equal(images[:NOISES], plain_images[:NOISES])
    for name in ("x0", "before", "after", "log_probs", "means"):
        ours, theirs = getattr(mixed, name), getattr(plain, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours[:NOISES], theirs[:NOISES], err_msg=name)
    gap = np.abs(mixed.x0 - plain.x0).reshape(SIZE, -1).max(1)
    assert (gap[:NOISES] == 0).all() and (gap[NOISES:] > 1e-2).all()


def test_members_of_one_noise_start_together_and_part_by_condition(explored):
    record = explored[1]
    rows = record.x0.reshape(CONDITIONS, NOISES, -1)
    starts = record.before[:, 0].reshape(CONDITIONS, NOISES, -1)
    np.testing.assert_array_equal(starts, np.stack([starts[0]] * CONDITIONS))
    assert (starts[:, 0] != starts[:, 1]).any()
    assert len({row.tobytes() for row in rows.reshape(SIZE, -1)}) == SIZE


def test_how_a_group_is_cut_changes_rounding_at_most(sampler, conditions, perturbation):
    whole = sampler.draw(grid()[0], {TEXT: conditions[0]}, None, ODE, {TEXT: perturbation})[2].x0
    for size in (2, 3):
        parts = [
            sampler.draw(part, {TEXT: conditions[0]}, None, ODE, {TEXT: perturbation})[2].x0 for part in grid(size)
        ]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-4)


def test_rho_says_how_long_a_perturbation_lasts(sampler, conditions, perturbation):
    plain = sampler.draw(originals(grid()[0]), {TEXT: conditions[0]}, None, ODE)[2].x0
    gaps = []
    for rho in (0.01, 0.2, 0.4, 1.0):  # at .01 only the first step, sigma = 1, is perturbed
        x0 = sampler.draw(
            grid()[0], {TEXT: conditions[0]}, None, replace(ODE, exploration=E2po(rho=rho)), {TEXT: perturbation}
        )[2].x0
        gaps.append(np.abs(x0 - plain)[NOISES:].mean())
    assert 0 < gaps[0] < gaps[1] < gaps[2] < gaps[3]


@pytest.mark.parametrize(
    ("changes", "weights"),
    [({"schedule": "static"}, [1] * STEPS), ({"clock": "time", "rho": 0.4}, [1, 7 / 12, 1 / 6, 0, 0, 0])],
    ids=["static", "time"],
)
def test_another_schedule_or_clock_gives_the_network_the_blends_of_its_own_weights(
    sampler, conditions, perturbation, changes, weights
):
    """By time, step k of 6 stands at 1 - k / 6: (1 - k / 6 - .6) / .4."""
    fed, everything = [], own_conditions(conditions[0], perturbation)
    handle = sampler.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["encoder_hidden_states"].numpy().copy()), with_kwargs=True
    )
    asked, chunk = replace(ODE, exploration=E2po(**changes)), grid()[0]
    sampler.draw(chunk, {TEXT: conditions[0]}, None, asked, {TEXT: perturbation})
    handle.remove()
    for call, weight in zip(fed, weights, strict=True):
        for member, variant in enumerate(chunk.variants):
            expected = weight * everything[variant][0] + (1 - weight) * everything[0][0]
            np.testing.assert_allclose(call[member], expected, rtol=0, atol=2e-6)


def test_without_the_anchor_a_group_has_every_noise_under_perturbed_conditions_only(sampler, conditions):
    config = E2po(conditions=CONDITIONS, anchor=False, iterations=5)
    (found,) = sampler.perturb([TEXT], config, 0)
    assert len(found.hidden) == len(found.cosines) == CONDITIONS
    (chunk,) = plan_step([Prompt(0, TEXT)], 7, 0, 1, NOISES, SIZE, CONDITIONS, anchor=False)
    assert chunk.variants == [1, 1, 2, 2, 3, 3] and chunk.noises == grid()[0].noises and chunk.seeds == grid()[0].seeds
    drawn = sampler.draw(chunk, {TEXT: conditions[0]}, None, ODE, {TEXT: found})[2].x0.reshape(CONDITIONS, NOISES, -1)
    plain = sampler.draw(originals(chunk), {TEXT: conditions[0]}, None, ODE)[2].x0.reshape(CONDITIONS, NOISES, -1)
    assert (np.abs(drawn - plain).max(2) > 1e-3).all()


def test_learned_each_time_a_prompt_gets_others_in_another_step_and_the_same_again_in_the_same(sampler):
    once, each = (E2po(conditions=2, iterations=3, learned=learned) for learned in ("once", "each_time"))
    assert once.seed_in(7, 1) == once.seed_in(7, 2) == 7

    def key_and_bits(step):
        (found,) = sampler.backbone.perturb([TEXT], each, each.seed_in(7, step))
        return found.key, found.hidden.tobytes()

    first, second, again = (key_and_bits(step) for step in (1, 2, 1))
    assert first == again and first[0] != second[0] and first[1] != second[1]


def test_both_encoders_perturb_clip_gs_slots_as_well_and_leave_the_rest(sampler, conditions):
    first, both = (E2po(conditions=3, iterations=5, encoders=encoders) for encoders in ("first", "both"))
    (alone,), (found,) = (sampler.backbone.perturb([TEXT], config, 0) for config in (first, both))
    rows, width = alone.hidden.shape[1:]
    np.testing.assert_array_equal(found.hidden[..., :width], alone.hidden)
    np.testing.assert_array_equal(found.pooled[:, : alone.pooled.shape[1]], alone.pooled)
    second = sampler.backbone._text.text_encoder_2.config
    whole = width + second.hidden_size
    assert found.hidden.shape == (2, rows, whole) and found.pooled.shape[1] == len(conditions[0].pooled)
    inserted = sampler.backbone.insert(conditions[0], found, 1)
    changed = inserted.sequence != conditions[0].sequence
    assert changed[1:rows, width:whole].any() and not changed[rows:].any() and not changed[:, whole:].any()
    assert (inserted.pooled[alone.pooled.shape[1] :] != conditions[0].pooled[alone.pooled.shape[1] :]).any()
    assert 0 < found.cosines.max() < 1 and found.key != alone.key


# ------------------------------------------------------------------------------------- E1: a perturbation that is none


@pytest.mark.parametrize("request_", [ODE, SDE, replace(ODE, step=Dpm2.Config())], ids=["euler", "flow_sde", "dpm2"])
def test_a_perturbation_equal_to_the_original_draws_the_originals_bits(sampler, conditions, perturbation, request_):
    rows, width = perturbation.hidden.shape[1:]
    same = Perturbation(
        "same",
        np.stack([conditions[0].sequence[:rows, :width]] * (CONDITIONS - 1)),
        np.stack([conditions[0].pooled[:width]] * (CONDITIONS - 1)),
        np.ones(CONDITIONS - 1),
        1.0,
    )
    _, images, record = sampler.draw(grid()[0], {TEXT: conditions[0]}, None, request_, {TEXT: same})
    _, plain_images, plain = sampler.draw(originals(grid()[0]), {TEXT: conditions[0]}, None, request_)
    np.testing.assert_array_equal(images, plain_images)
    assert_records_equal(record, plain)


def test_a_prompt_without_content_is_explored_without_effect(sampler, conditions):
    (found,) = sampler.perturb([""], E2po(conditions=CONDITIONS, iterations=5), 0)
    rows = tuple(replace(row, prompt=Prompt(0, "")) for row in grid()[0].rows)
    chunk = replace(grid()[0], rows=rows)
    _, images, record = sampler.draw(chunk, {"": conditions[1]}, None, ODE, {"": found})
    _, plain_images, plain = sampler.draw(originals(chunk), {"": conditions[1]}, None, ODE)
    np.testing.assert_array_equal(images, plain_images)
    np.testing.assert_array_equal(record.x0, plain.x0)


# -------------------------------------------------------------------------- densities: the policy's, not the explorer's


def test_what_was_drawn_is_a_sample_of_the_blended_condition(sampler, conditions, perturbation, explored):
    record, chunk = explored[1], grid()[0]
    generators = [stream(seed ^ 1) for seed in chunk.seeds]
    for k in range(STEPS - 1):
        sigma, sigma_next = record.sigmas[k : k + 2]
        x = torch.from_numpy(record.before[:, k])
        texts = [blended(conditions[0], perturbation, variant, sigma) for variant in chunk.variants]
        mean, std = sde_step(x, velocity(sampler, x, sigma, texts), sigma, sigma_next, record.sigmas)
        noise = initial_noise(generators, sampler.backbone.latent_shape)
        np.testing.assert_allclose(record.after[:, k], mean + std * noise, rtol=0, atol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_recorded_densities_are_those_under_the_original_condition(sampler, conditions, perturbation, guidance):
    chunk, null = grid()[0], conditions[1] if guidance > 1 else None
    _, _, record = sampler.draw(
        chunk, {TEXT: conditions[0]}, null, replace(SDE, guidance=guidance), {TEXT: perturbation}
    )

    def predicted(x, sigma, texts):
        v = velocity(sampler, x, sigma, texts)
        if guidance == 1:
            return v
        v_null = velocity(sampler, x, sigma, [(conditions[1].sequence, conditions[1].pooled)] * SIZE)
        return v_null + guidance * (v - v_null)

    for k in range(STEPS - 1):
        sigma, sigma_next = record.sigmas[k : k + 2]
        x, x_next = torch.from_numpy(record.before[:, k]), torch.from_numpy(record.after[:, k]).double()
        log_probs = []
        for variants in ([0] * SIZE, chunk.variants):
            texts = [blended(conditions[0], perturbation, variant, sigma) for variant in variants]
            mean, std = sde_step(x, predicted(x, sigma, texts), sigma, sigma_next, record.sigmas)
            log_probs.append(torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).mean(1).numpy())
            if variants != chunk.variants:
                np.testing.assert_allclose(record.means[:, k], mean, rtol=0, atol=1e-5)
        original, explorers = log_probs
        np.testing.assert_allclose(record.log_probs[:, k], original, rtol=0, atol=2e-5)
        apart = np.abs(explorers - original)[NOISES:]
        assert (apart > 1e-4).all() if WEIGHTS[k] > 0.1 else (apart == 0).all()


def test_recording_densities_changes_nothing_that_is_drawn(sampler, conditions, perturbation, explored):
    bare = replace(SDE, window=Window(ALL, (), 0))
    _, images, record = sampler.draw(grid()[0], {TEXT: conditions[0]}, None, bare, {TEXT: perturbation})
    np.testing.assert_array_equal(images, explored[0])
    np.testing.assert_array_equal(record.x0, explored[1].x0)
    assert record.before is None and record.log_probs is None


def test_an_ode_draw_of_explorers_records_final_latents_only(sampler, conditions, perturbation):
    _, _, record = sampler.draw(grid()[0], {TEXT: conditions[0]}, None, ODE, {TEXT: perturbation})
    assert record.indices.shape == (SIZE, 0)
    assert [record.before, record.after, record.log_probs, record.means] == [None] * 4
