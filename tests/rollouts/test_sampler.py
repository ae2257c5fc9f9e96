from dataclasses import replace

import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import adapter_parameters
from align_cluster.backbones.levels import flux_sigmas, sd3_sigmas
from align_cluster.conditions.exploration import E2po
from align_cluster.prompts.groups import plan_step
from align_cluster.rollouts.denoise import Path, initial_noise
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.sampler import DrawRequest, Sampler, fingerprint, recorded_indices
from align_cluster.rollouts.schedule import FluxSchedule, LinearSchedule, Sd3Schedule
from align_cluster.rollouts.steps import STEPS as KINDS
from align_cluster.rollouts.steps import Cps, DanceSde, Dpm2, Euler, FlowDdim, FlowSde
from align_cluster.rollouts.windows import FractionWindow, Window
from align_cluster.streams import stream
from align_cluster.types import Chunk, Prompt
from align_cluster.weights import check, publish

from ..drawing import chunk_of

TEXT = "a photo of a red circle"
STEPS = 4


def chunk(*seeds: int) -> Chunk:
    return chunk_of(Prompt(0, TEXT), seeds)


def noisy(*trained: int) -> Window:
    """Noise at all steps, some of them recorded."""
    return Window(tuple(range(STEPS)), trained, len(trained))


def trained(sampler: Sampler) -> dict[str, np.ndarray]:
    """Adapter weights that are far from zero."""
    rng = np.random.default_rng(0)
    shapes = {name: tuple(p.shape) for name, p in adapter_parameters(sampler.denoiser, "default").items()}
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in sorted(shapes.items())}


@pytest.fixture(scope="module")
def base(settings):
    """Samplers of version 0, which have adopted nothing."""
    return Sampler(settings, name="a"), Sampler(settings, name="b")


@pytest.fixture(scope="module")
def conditions(base):
    return base[0].encode([TEXT, "", "a photo of two blue squares"])


@pytest.fixture(scope="module")
def tuned(settings):
    """A sampler that holds weights 5, and the state that it adopted."""
    sampler = Sampler(settings, name="tuned")
    state = trained(sampler)
    sampler.adopt(*publish(state, 5))
    return sampler, state


def test_a_sample_depends_on_its_seed_only_and_not_on_its_neighbours(base, conditions):
    request = DrawRequest(0, STEPS, FlowSde.Config(), window=noisy(0, 2))
    _, images, record = base[0].draw(chunk(11, 12, 13), {TEXT: conditions[0]}, None, request)
    _, others, other = base[0].draw(chunk(77, 12, 99), {TEXT: conditions[0]}, None, request)
    np.testing.assert_array_equal(images[1], others[1])
    for name in ("x0", "before", "after", "log_probs"):
        np.testing.assert_array_equal(getattr(record, name)[1], getattr(other, name)[1])
    assert (images[0] != others[0]).any()


def test_two_samplers_draw_a_chunk_bitwise_alike(base, conditions):
    for step, window in [(FlowSde.Config(), noisy(0, 2)), (Dpm2.Config(), None)]:
        request = DrawRequest(0, STEPS, step, guidance=3.0, window=window)
        draws = [sampler.draw(chunk(1, 2, 3), {TEXT: conditions[0]}, conditions[1], request) for sampler in base]
        (info, images, record), (info2, images2, record2) = draws
        assert info.fingerprint == info2.fingerprint and info.version == info2.version == 0
        np.testing.assert_array_equal(images, images2)
        for name in ("x0", "sigmas", "indices", "before", "after", "log_probs"):
            np.testing.assert_array_equal(getattr(record, name), getattr(record2, name))


def test_a_record_holds_what_was_asked_for_in_the_documented_shapes(base, conditions):
    request = DrawRequest(0, STEPS, FlowSde.Config(), window=noisy(0, 2))
    info, images, record = base[0].draw(chunk(1, 2, 3), {TEXT: conditions[0]}, None, request)
    shape = base[0].backbone.latent_shape
    assert images.shape == (3, 48, 48, 3) and images.dtype == np.uint8
    assert record.x0.shape == (3, *shape) and record.x0.dtype == np.float32
    assert record.before.shape == record.after.shape == (3, 2, *shape) and record.log_probs.shape == (3, 2)
    assert record.before.dtype == record.after.dtype == record.log_probs.dtype == np.float32
    np.testing.assert_array_equal(record.indices, [[0, 2]] * 3)
    np.testing.assert_array_equal(record.sigmas, base[0].backbone.sigmas(STEPS))
    assert info.chunk == record.chunk == chunk(1, 2, 3)


def test_drawing_with_other_weights_than_asked_for_is_refused(tuned, conditions):
    for version in (0, 4, 6):
        with pytest.raises(RuntimeError, match=f"tuned holds weights 5, but was asked to draw with {version}"):
            tuned[0].draw(chunk(1), {TEXT: conditions[0]}, None, DrawRequest(version, STEPS, Euler.Config()))


def test_adopting_changes_images_and_the_receipt_proves_it(base, conditions, settings):
    sampler = Sampler(settings, name="c")
    manifest, buffer = publish(trained(sampler), 3)
    buffer.flags.writeable = False  # as it comes out of the object store
    _, before, _ = sampler.draw(chunk(1, 2), {TEXT: conditions[0]}, None, DrawRequest(0, STEPS, Euler.Config()))
    receipt = sampler.adopt(manifest, buffer)
    check(manifest, [receipt], 1)
    assert receipt.checksum == manifest.checksum and receipt.bound == len(manifest.tensors) and receipt.version == 3
    _, after, _ = sampler.draw(chunk(1, 2), {TEXT: conditions[0]}, None, DrawRequest(3, STEPS, Euler.Config()))
    assert (before != after).any()


def test_a_refused_sync_leaves_the_weights_that_were_there(settings):
    sampler = Sampler(settings, name="d")
    state = trained(sampler)
    sampler.adopt(*publish(state, 1))
    wrong = {name: value + 1 for name, value in state.items()}
    last = sorted(wrong)[-1]
    wrong[last] = wrong[last][:1]
    with pytest.raises(RuntimeError, match="expected"):
        sampler.adopt(*publish(wrong, 2))
    assert sampler.version == 1
    for name, parameter in adapter_parameters(sampler.denoiser, "default").items():
        np.testing.assert_array_equal(parameter.detach().numpy(), state[name])


def test_guidance_one_is_no_guidance_and_costs_no_second_call(base, conditions):
    calls = []
    watch = base[0].denoiser.register_forward_hook(lambda *_: calls.append(1))
    images, counts = [], []
    for null, guidance in ((None, 1.0), (conditions[1], 1.0), (conditions[1], 3.0)):
        calls.clear()
        request = DrawRequest(0, STEPS, Euler.Config(), guidance=guidance)
        images.append(base[0].draw(chunk(1, 2), {TEXT: conditions[0]}, null, request)[1])
        counts.append(len(calls))
    watch.remove()
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[2] != images[0]).any()
    assert counts == [STEPS, STEPS, 2 * STEPS]


def test_guidance_is_the_formula_and_only_the_text_branch_carries_gradient(tuned, conditions):
    sampler = tuned[0]
    backbone, denoiser = sampler.backbone, sampler.denoiser
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma, text = torch.full((2,), 0.7), TextBatch.build([conditions[0]] * 2, conditions[1], torch.device("cpu"))
    parameters = list(adapter_parameters(denoiser, "default").values())
    v_text = backbone.velocity(denoiser, x, sigma, text.sequence, text.pooled)
    v_null = backbone.velocity(denoiser, x, sigma, text.null_sequence, text.null_pooled)
    guided = guided_velocity(backbone, denoiser, x, sigma, text, 4.5)
    torch.testing.assert_close(guided, v_null + 4.5 * (v_text - v_null), rtol=0, atol=1e-6)
    ours = torch.autograd.grad(guided.square().mean(), parameters)
    expected = torch.autograd.grad(v_text, parameters, 4.5 * (2 / guided.numel()) * guided.detach())
    for gradient, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in ours)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_our_ode_sample_is_the_stock_pipelines_image(base, conditions, stock, guidance):
    seeds = (3, 4)
    noise = initial_noise([stream(seed) for seed in seeds], base[0].backbone.latent_shape)
    request = DrawRequest(0, 6, Euler.Config(), guidance=guidance)
    _, images, record = base[0].draw(chunk(*seeds), {TEXT: conditions[0]}, conditions[1], request)
    arguments = {"num_inference_steps": 6, "guidance_scale": guidance, "max_sequence_length": 0}
    latents = stock([TEXT] * 2, latents=noise.clone(), output_type="latent", **arguments).images
    np.testing.assert_allclose(record.x0, latents.numpy(), rtol=0, atol=2e-5)
    theirs = stock([TEXT] * 2, latents=noise.clone(), output_type="pil", **arguments).images
    gap = np.abs(images.astype(int) - np.stack([np.asarray(image) for image in theirs]).astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 1e-3  # values on a rounding boundary may fall to either side


def test_our_encoding_is_the_stock_pipelines(base, conditions, stock):
    for text, condition in zip([TEXT, "", "a photo of two blue squares"], conditions, strict=True):
        sequence, _, pooled, _ = stock.encode_prompt(text, None, None, max_sequence_length=0)
        np.testing.assert_array_equal(condition.sequence, sequence[0].float().detach().numpy())
        np.testing.assert_array_equal(condition.pooled, pooled[0].float().detach().numpy())


def test_a_text_is_encoded_alike_alone_in_company_and_from_the_cache(base, settings, monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_CLUSTER_CACHE", str(tmp_path))
    texts = ["a green star", "two red squares", "a green star"]
    first = base[0].encode(texts)
    cached = base[1].encode(texts)
    monkeypatch.setenv("ALIGN_CLUSTER_CACHE", str(tmp_path / "other"))
    alone = base[1].encode(texts[1:2])
    for a, b in [*zip(first, cached, strict=True), (first[1], alone[0]), (first[0], first[2])]:
        assert a.key == b.key
        np.testing.assert_array_equal(a.sequence, b.sequence)
        np.testing.assert_array_equal(a.pooled, b.pooled)


def test_the_fingerprint_changes_with_everything_that_decides_a_draw():
    settings = {"version": 1, "steps": STEPS, "step": FlowSde.Config(), "guidance": 2.0, "window": noisy(0, 1)}
    changes = [
        {"version": 2},
        {"steps": 5},
        {"step": Euler.Config()},
        {"step": FlowSde.Config(noise_level=0.8)},
        {"guidance": 2.5},
        {"window": noisy(0, 2)},
        {"window": None},
        {"window": Window((0, 1), (0, 1), 2)},
        {"window": Window(tuple(range(STEPS)), (0, 1), 1)},
        {"means": True},
        {"schedule": LinearSchedule.Config()},
        {"exploration": E2po()},
        {"exploration": E2po(clock="time")},
    ]
    request, two = DrawRequest(**settings), chunk(1, 2)
    others = [chunk(2, 1), chunk_of(Prompt(0, TEXT), (1, 2), noises=(1, 1))]
    variants = chunk_of(Prompt(0, TEXT), (1, 2), variants=(0, 1))
    key, perturbed = {TEXT: "key"}, {TEXT: "perturbation"}
    prints = [fingerprint(two, DrawRequest(**(settings | change)), key, {}) for change in ({}, *changes)]
    prints += [fingerprint(other, request, key, {}) for other in others]
    prints += [fingerprint(two, request, {TEXT: "other"}, {})]
    prints += [fingerprint(variants, request, key, one) for one in (perturbed, {TEXT: "other"})]
    assert len(set(prints)) == len(prints)
    assert fingerprint(chunk(1, 2), DrawRequest(**settings), key, {}) == prints[0]


# ----------------------------------------------------------------------------------- windows, schedules, shared noises

NOISY = [FlowSde.Config(), DanceSde.Config(), Cps.Config(), FlowDdim.Config()]


def predicted(sampler, condition, x, sigma):
    """The network's output for latents [B, C, H, W] of one prompt, batched as a draw batches it."""
    text = TextBatch.build([condition] * len(x), None, torch.device("cpu"))
    with torch.no_grad():
        return sampler.backbone.velocity(sampler.denoiser, x, sigma, text.sequence, text.pooled)


@pytest.mark.parametrize("kind", NOISY, ids=lambda config: config.kind)
def test_steps_outside_the_window_are_eulers_bit_by_bit_and_only_those(tuned, conditions, kind):
    sampler, window = tuned[0], Window((1,), tuple(range(STEPS)), STEPS)  # every step is recorded, one is noisy
    _, _, record = sampler.draw(chunk(1, 2, 3), {TEXT: conditions[0]}, None, DrawRequest(5, STEPS, kind, window=window))
    np.testing.assert_array_equal(record.after[:, :-1], record.before[:, 1:])
    np.testing.assert_array_equal(record.after[:, -1], record.x0)
    for k in range(STEPS):
        x, sigma = torch.from_numpy(record.before[:, k]), record.sigmas[k]
        v = predicted(sampler, conditions[0], x, torch.full((3,), float(sigma)))
        euler = (x + v * torch.tensor(record.sigmas[k + 1] - sigma, dtype=torch.float32)).numpy()
        ours = Euler(Euler.Config(), record.sigmas).advance(k, x, v).numpy()
        np.testing.assert_allclose(ours, euler, rtol=0, atol=1e-6)
        if k in window.noisy:
            assert (np.abs(record.after[:, k] - ours).reshape(3, -1).max(1) > 1e-2).all()
        else:
            np.testing.assert_array_equal(record.after[:, k], ours)


@pytest.mark.parametrize("kind", NOISY, ids=lambda config: config.kind)
def test_a_draw_without_noisy_steps_is_eulers(base, conditions, kind):
    nothing = DrawRequest(0, STEPS, kind, window=Window((), (), 0))
    first = base[0].draw(chunk(1, 2), {TEXT: conditions[0]}, None, nothing)
    second = base[0].draw(chunk(1, 2), {TEXT: conditions[0]}, None, DrawRequest(0, STEPS, Euler.Config()))
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[2].x0, second[2].x0)


def test_recorded_densities_are_recomputed_bitwise_and_those_of_the_window_only(tuned, conditions):
    request = DrawRequest(5, STEPS, FlowSde.Config(), window=Window((1, 2), (1, 2), 2), means=True)
    _, _, record = tuned[0].draw(chunk(1, 2, 3), {TEXT: conditions[0]}, None, request)
    np.testing.assert_array_equal(record.indices, [[1, 2]] * 3)
    step = FlowSde(FlowSde.Config(), record.sigmas)
    for slot, k in enumerate((1, 2)):
        x, x_next = (torch.from_numpy(part[:, slot]) for part in (record.before, record.after))
        v = predicted(tuned[0], conditions[0], x, torch.full((3,), float(record.sigmas[k])))
        mean, std, _ = step.mean(torch.full((3,), k), x, v)
        np.testing.assert_array_equal(record.means[:, slot], mean.numpy())
        log_prob = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x_next).flatten(1).mean(1)
        np.testing.assert_allclose(record.log_probs[:, slot], log_prob, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(record.log_probs[:, slot], step.density(mean, std, x_next).numpy())


def test_means_are_recorded_only_where_they_are_asked_for_and_change_nothing_else(base, conditions):
    request = DrawRequest(0, STEPS, FlowSde.Config(), window=noisy(0, 2))
    plain = base[0].draw(chunk(1, 2), {TEXT: conditions[0]}, None, request)[2]
    asked = base[0].draw(chunk(1, 2), {TEXT: conditions[0]}, None, replace(request, means=True))[2]
    assert plain.means is None and asked.means.shape == asked.before.shape
    for name in ("x0", "before", "after", "log_probs"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(asked, name))


def test_a_members_own_steps_are_a_function_of_its_seed(base, conditions):
    window = FractionWindow(FractionWindow.Config(fraction=0.7, choice="per_sample")).plan(STEPS, 0, 0)
    assert (window.trained, window.keep) == ((0, 1, 2), 2)
    request = DrawRequest(0, STEPS, FlowSde.Config(), window=window)
    seeds = tuple(range(100, 116))
    alone = np.concatenate([recorded_indices(chunk(seed), window) for seed in seeds])
    np.testing.assert_array_equal(recorded_indices(chunk(*seeds), window), alone)
    np.testing.assert_array_equal(recorded_indices(chunk(*seeds[::-1]), window), alone[::-1])
    shared = chunk_of(Prompt(0, TEXT), seeds, noises=(1,) * 16, variants=(0, 1) * 8)
    np.testing.assert_array_equal(recorded_indices(shared, window), alone)
    assert len({tuple(row) for row in alone.tolist()}) > 3 and all(len(set(row)) == 2 for row in alone.tolist())
    record = base[0].draw(chunk(*seeds[:4]), {TEXT: conditions[0]}, None, request)[2]
    full = base[0].draw(chunk(*seeds[:4]), {TEXT: conditions[0]}, None, replace(request, window=noisy(0, 1, 2)))[2]
    np.testing.assert_array_equal(record.indices, alone[:4])
    np.testing.assert_array_equal(record.x0, full.x0)
    rows = np.arange(4)[:, None]
    for name in ("before", "after", "log_probs"):
        np.testing.assert_array_equal(getattr(record, name), getattr(full, name)[rows, alone[:4]])


def test_members_that_share_a_noise_start_from_one_latent_and_still_differ(base, conditions):
    (shared,) = plan_step([Prompt(0, TEXT)], 0, 0, 1, 4, 4, same_noise=True)
    (own,) = plan_step([Prompt(0, TEXT)], 0, 0, 1, 4, 4)
    request = DrawRequest(0, STEPS, FlowSde.Config(), window=noisy(0, 1))
    _, images, record = base[0].draw(shared, {TEXT: conditions[0]}, None, request)
    np.testing.assert_array_equal(record.before[:, 0], np.stack([record.before[0, 0]] * 4))
    assert len({part.tobytes() for part in record.after[:, 0]}) == len({image.tobytes() for image in images}) == 4
    _, others, other = base[0].draw(own, {TEXT: conditions[0]}, None, request)
    assert len({part.tobytes() for part in other.before[:, 0]}) == 4
    np.testing.assert_array_equal(images[0], others[0])  # member 0's noise is the shared one, and its seed its own
    assert (images[1] != others[1]).any()


@pytest.mark.parametrize("kind", ["euler", "flow_sde"])
def test_a_draw_has_the_levels_of_its_schedule(base, conditions, kind):
    native = base[0].backbone.sigmas(STEPS)
    tokens = base[0].backbone.image_tokens
    linear = [1, 0.9, 0.75, 0.5, 0]  # 3 t / (1 + 2 t)
    expected = [
        (None, native),
        (Sd3Schedule.Config(), sd3_sigmas(STEPS, 3.0)),
        (LinearSchedule.Config(), linear),
        (FluxSchedule.Config(), flux_sigmas(STEPS, tokens)),
    ]
    drawn = set()
    for schedule, sigmas in expected:
        request = DrawRequest(0, STEPS, KINDS[kind].Config(), window=noisy(0, 1) if kind == "flow_sde" else None)
        request = replace(request, schedule=schedule) if schedule else request
        _, images, record = base[0].draw(chunk(1, 2), {TEXT: conditions[0]}, None, request)
        np.testing.assert_allclose(record.sigmas, sigmas, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(base[0].sigmas(request), record.sigmas)
        drawn.add(images.tobytes())
    assert len(drawn) == len(expected)


def test_a_deterministic_rollout_records_the_states_that_are_asked_for_and_nothing_else(base, conditions):
    plain = DrawRequest(0, STEPS, Euler.Config())
    _, images, record = base[0].draw(chunk(1, 2, 3), {TEXT: conditions[0]}, None, plain)
    _, same, kept = base[0].draw(
        chunk(1, 2, 3), {TEXT: conditions[0]}, None, replace(plain, window=Window((), (0, STEPS - 1), 1))
    )
    np.testing.assert_array_equal(images, same)
    np.testing.assert_array_equal(record.x0, kept.x0)
    assert kept.after is None and kept.log_probs is None and kept.before.shape == (3, 1, *record.x0.shape[1:])
    noise = initial_noise([stream(seed) for seed in (1, 2, 3)], record.x0.shape[1:]).numpy()
    for row, (k,) in enumerate(kept.indices):
        assert k in (0, STEPS - 1) and (k > 0 or (kept.before[row, 0] == noise[row]).all())


def test_offline_a_chunk_is_its_prompts_own_image_whatever_the_weights(base, conditions, tmp_path):
    from PIL import Image

    from align_cluster.embedded import scene
    from align_cluster.embedded.render import render

    picture = render([scene.prompts("colors", "train")[0]], 0)[0].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "real.png")
    given = chunk_of(Prompt(0, TEXT, {"image": str(tmp_path / "real.png")}), (1, 2))
    request = DrawRequest(0, STEPS, Euler.Config(), offline=True)
    info, images, record = base[0].draw(given, {TEXT: conditions[0]}, None, request)
    assert np.abs(images.astype(int) - picture).mean() < 4, "what the VAE makes of it"
    np.testing.assert_array_equal(record.x0[0], record.x0[1])
    assert record.indices.shape == (2, 0) and record.chunk.noises == [1, 2]
    assert info.fingerprint != fingerprint(given, replace(request, offline=False), {TEXT: conditions[0].key}, {})


# ------------------------------------------------------------------------------------------ rows that are not finite

OTHER = "a photo of two blue squares"
MIXED = Chunk(0, 0, chunk(1).rows + chunk_of(Prompt(1, OTHER), (2,), number=1).rows + chunk(3).rows)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_masked_and_the_others_are_drawn_as_if_it_were(base, conditions, broken):
    """The condition of the second row's prompt has a broken number in it."""
    request = DrawRequest(0, STEPS, FlowSde.Config(), window=noisy(0, 2), means=True)
    spoilt = replace(conditions[2], sequence=np.full_like(conditions[2].sequence, broken))
    whole, expected, clean = base[0].draw(MIXED, {TEXT: conditions[0], OTHER: conditions[2]}, None, request)
    info, images, record = base[0].draw(MIXED, {TEXT: conditions[0], OTHER: spoilt}, None, request)
    assert whole.non_finite == () and info.non_finite == (1,)
    assert not images[1].any() and expected[1].any()
    np.testing.assert_array_equal(images[[0, 2]], expected[[0, 2]])
    for name in ("x0", "before", "after", "log_probs", "means"):
        ours, theirs = getattr(record, name), getattr(clean, name)
        assert not ours[1].any() and theirs[1].any()
        np.testing.assert_array_equal(ours[[0, 2]], theirs[[0, 2]])
    assert info.contrast == pytest.approx(float(images[[0, 2]].std((1, 2, 3)).mean()) / 255)
    assert info.diversity == pytest.approx(float(images[[0, 2]].std(0).mean()) / 255)


def test_a_chunk_without_a_finite_row_has_no_contrast_and_no_diversity(base, conditions):
    spoilt = replace(conditions[0], pooled=np.full_like(conditions[0].pooled, np.nan))
    info, images, _ = base[0].draw(chunk(1, 2), {TEXT: spoilt}, None, DrawRequest(0, STEPS, Euler.Config()))
    assert info.non_finite == (0, 1) and not images.any() and (info.contrast, info.diversity) == (0, 0)


def test_pixels_that_overflow_in_the_vae_are_found_too(base):
    x0 = torch.randn(2, *base[0].backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    x0[1] *= 1e37
    path, images, finite = base[0].decoded(Path(x0))
    assert x0.isfinite().all() and finite.tolist() == [True, False]
    assert not images[1].any() and not path.x0[1].any()
    np.testing.assert_array_equal(images[:1], base[0].backbone.decode(x0[:1]))
