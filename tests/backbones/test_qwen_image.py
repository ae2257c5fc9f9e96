import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.base import CriticSection
from align_cluster.backbones.critic import Critic
from align_cluster.backbones.pipeline import pack
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.rollouts.sampler import Sampler

from .contract import TEXT, Case, noise_of, random_state, sample
from .test_critic import shake

GUIDANCE, TAIL, STEP = 4.0, 5, 0.02  # TAIL: the template's tokens after a prompt
BLOCKS = ("transformer_blocks.0.attn.to_q.", "transformer_blocks.1.attn.add_v_proj.", "transformer_blocks.0.txt_mlp.")


@pytest.fixture(scope="module")
def case(tiny_pipeline):
    return Case("qwen_image", tiny_pipeline("qwen_image"))


@pytest.fixture(scope="module")
def backbone(case):
    return case.backbone()


@pytest.fixture(scope="module")
def pipe(case):
    return case.pipe()


def predictions(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def pulled_back(v, v_null, weights):
    """Gradients of sum(weights * guide(v, v_null)) by v and v_null, from the formula, all of packed tokens [..., D]:
    with w = v_null + g (v - v_null) and s = |v| / |w|, d(s w) = s dw + w ((v . dv) / |v|^2 - (w . dw) / |w|^2) s."""

    def dot(a, b):
        return (a * b).sum(-1, keepdim=True)

    w = v_null + GUIDANCE * (v - v_null)
    scale = (dot(v, v) / dot(w, w)).sqrt()
    along = dot(weights, w)
    by_w = scale * (weights - along * w / dot(w, w))
    return GUIDANCE * by_w + scale * along * v / dot(v, v), (1 - GUIDANCE) * by_w


def test_guidance_has_the_bits_of_the_stock_pipelines_formula_for_each_sample_alone(backbone):
    v, v_null, _ = predictions((3, 4, 6, 10))
    guided = backbone.guide(v, v_null, GUIDANCE)
    noise_pred, neg_noise_pred = pack(v), pack(v_null)
    comb_pred = neg_noise_pred + GUIDANCE * (noise_pred - neg_noise_pred)
    norms = [torch.norm(one, dim=-1, keepdim=True) for one in (noise_pred, comb_pred)]
    assert torch.equal(pack(guided), comb_pred * (norms[0] / norms[1]))
    for k in range(3):
        assert torch.equal(backbone.guide(v[k : k + 1], v_null[k : k + 1], GUIDANCE), guided[k : k + 1])
    torch.testing.assert_close(pack(guided).norm(dim=-1), pack(v).norm(dim=-1))
    assert (guided - (v_null + GUIDANCE * (v - v_null))).abs().max() > 1  # plain guidance is something else


def test_the_gradient_of_guidance_is_the_formulas_in_both_branches(backbone):
    v, v_null, weights = predictions((2, 4, 4, 6), torch.float64)
    v.requires_grad_(), v_null.requires_grad_()
    found = torch.autograd.grad((weights * backbone.guide(v, v_null, GUIDANCE)).sum(), (v, v_null))
    for ours, expected in zip(found, pulled_back(*(pack(one.detach()) for one in (v, v_null, weights))), strict=True):
        torch.testing.assert_close(pack(ours), expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda a, b: backbone.guide(a, b, GUIDANCE), (v[:1, :, :2, :4], v_null[:1, :, :2, :4])
    )


@pytest.fixture(scope="module")
def trained(case, backbone):
    """(denoiser with a random adapter, x, sigma, weights of a scalar loss, conditions of a prompt and of none)."""
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ("default",))
    random_state(denoiser, 0.1)
    x, _, weights = predictions((2, *backbone.latent_shape))
    return denoiser, x, torch.tensor([0.9, 0.6]), weights, backbone.encode([TEXT, ""])


def gradient(trained, output, weights):
    parameters = adapter_parameters(trained[0], "default")
    found = torch.autograd.grad(
        (output * weights).sum(), parameters.values(), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


def predict(backbone, trained, null_gradient):
    denoiser, x, sigma, _, (condition, null) = trained
    text = TextBatch.build([condition] * len(x), null, x.device)
    return guided_velocity(backbone, denoiser, x, sigma, text, GUIDANCE, null_gradient)


def test_a_learners_gradient_is_that_of_the_branches_that_carry_one(backbone, trained):
    denoiser, x, sigma, weights, conditions = trained
    branches = []
    for condition in conditions:
        text = TextBatch.build([condition] * len(x), None, x.device)
        branches.append(guided_velocity(backbone, denoiser, x, sigma, text))
    pulled = pulled_back(*(pack(one.detach()) for one in (*branches, weights)))
    text, null = (gradient(trained, pack(branch), weight) for branch, weight in zip(branches, pulled, strict=True))
    for null_gradient in (False, True):
        found = gradient(trained, predict(backbone, trained, null_gradient), weights)
        for name, value in found.items():
            expected = text[name] + null[name] if null_gradient else text[name]
            assert float((value - expected).norm()) <= 1e-4 * float(expected.norm()), name
    total = [sum(float(value.norm() ** 2) for value in one.values()) for one in (text, null)]
    assert total[1] > 0.01 * total[0]  # so a lost branch would be seen


@pytest.mark.parametrize("block", BLOCKS)
def test_the_gradient_of_both_branches_is_that_of_finite_differences(backbone, trained, block):
    name = next(name for name in adapter_parameters(trained[0], "default") if block in name and "lora_B" in name)
    parameter = adapter_parameters(trained[0], "default")[name]
    slope = gradient(trained, predict(backbone, trained, True), trained[3])[name]
    start, direction, values = parameter.detach().clone(), slope / slope.norm(), []
    with torch.no_grad():
        for shift in (STEP, -STEP):
            parameter.copy_(start + shift * direction)
            values.append((predict(backbone, trained, True).double() * trained[3].double()).sum().item())
        parameter.copy_(start)
    assert (values[0] - values[1]) / (2 * STEP) == pytest.approx(float(slope.norm()), rel=5e-3)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (928, 1664)])
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_noise_levels_are_the_stock_schedulers_at_sizes_of_real_images(case, pipe, size, steps):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    backbone, scheduler = case.backbone(height=size[0], width=size[1]), pipe.scheduler
    assert backbone.image_tokens == size[0] // 16 * size[1] // 16
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(backbone.image_tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sigmas = backbone.sigmas(steps)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=2e-6, atol=1e-7)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and sigmas[-2] == pytest.approx(0.02)


def test_a_text_has_its_own_length_without_the_templates_head(backbone):
    short, empty, longer = backbone.encode([TEXT, "", TEXT + " of two blue squares"])
    assert [len(one.sequence) for one in (short, empty, longer)] == [6 + TAIL, 1 + TAIL, 10 + TAIL]
    assert {one.pooled.shape for one in (short, empty, longer)} == {(0,)}
    (blank,) = backbone.encode([" "])
    np.testing.assert_array_equal(blank.sequence, empty.sequence)


def test_a_text_beyond_the_tokenizers_limit_is_cut_as_the_stock_pipeline_does(case, pipe):
    (condition,) = case.backbone(max_sequence_length=1024).encode(["red " * 1100])
    with torch.no_grad():
        sequence, _ = pipe.encode_prompt("red " * 1100, max_sequence_length=1024)
    assert condition.sequence.shape == (1024, 32)
    np.testing.assert_array_equal(condition.sequence, sequence[0].numpy())


def test_texts_that_the_stock_pipeline_pads_and_masks_in_a_batch_are_drawn_alike(case, backbone, pipe):
    texts, noise = [TEXT, "two blue squares of " * 8 + TEXT], noise_of(backbone, (0, 1))
    theirs = case.tiny.draw(pipe, texts, noise, 4, GUIDANCE, "latent")
    denoiser = backbone.load_denoiser()
    for seed, text in enumerate(texts):
        ours = sample(backbone, denoiser, backbone.encode([text, ""]), (seed,), GUIDANCE)
        torch.testing.assert_close(ours[0], theirs[seed], rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_texts_of_different_lengths_in_a_batch_give_each_row_what_it_has_alone(backbone):
    """The denoiser and the critic, whose batches a mask tells where texts end."""
    actor = add_adapters(backbone, backbone.load_denoiser(), ("default", "critic"))
    random_state(actor, 0.1)
    critic = Critic(backbone, actor, 2, CriticSection(width=16, heads=2))
    shake(critic)
    conditions = backbone.encode([TEXT, "two blue squares of " * 8 + TEXT, "red"])
    assert len({len(one.sequence) for one in conditions}) == 3
    x, sigma = noise_of(backbone, range(3)), torch.tensor([0.9, 0.6, 0.3])
    text = TextBatch.build(conditions, None, x.device)
    lengths = [len(one.sequence) for one in conditions]
    assert text.mask.sum(1).tolist() == lengths and text.sequence.shape[1] == max(lengths)
    with torch.no_grad():
        together = guided_velocity(backbone, actor, x, sigma, text)
        values = critic(x, sigma, text.sequence, text.pooled, text.mask)
        for row, condition in enumerate(conditions):
            one, own = slice(row, row + 1), TextBatch.build([condition], None, x.device)
            assert own.mask is None
            alone = guided_velocity(backbone, actor, x[one], sigma[one], own)
            torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)
            value = critic(x[one], sigma[one], own.sequence, own.pooled)
            torch.testing.assert_close(values[one], value, rtol=0, atol=1e-5)
        unmasked = backbone.velocity(actor, x, sigma, text.sequence, text.pooled)
    assert (unmasked - together)[0].abs().max() > 1e-4, "without the mask, padding would be read"


def test_conditions_without_a_pooled_part_go_through_the_cache(backbone):
    sampler = Sampler(backbone.config)
    (made,), (kept,) = sampler.encode([TEXT]), Sampler(backbone.config).encode([TEXT])
    assert "_text" in sampler.backbone.__dict__ and kept.pooled.shape == (0,)
    assert kept.key == made.key and kept.sequence.tobytes() == made.sequence.tobytes()


def test_the_cut_off_is_part_of_a_conditions_key(case, backbone):
    assert backbone.condition_key(TEXT) != case.backbone(max_sequence_length=63).condition_key(TEXT)


def test_without_a_size_images_have_the_stock_pipelines(case, pipe):
    native = case.backbone(height=None, width=None)
    assert native.latent_shape[1:] == (pipe.default_sample_size,) * 2 and native.image_tokens == 4096


def test_images_pass_gradients_to_latents(backbone):
    latents = (0.1 * noise_of(backbone, (0, 1))).requires_grad_()
    pixels = backbone.pixels(latents)
    assert pixels.shape == (2, 3, 64, 64)
    (slope,) = torch.autograd.grad(pixels[0].sum(), latents)
    assert slope[0].abs().max() > 0 and not slope[1].any()


def test_bf16_changes_velocities_and_images_by_rounding_only(case, backbone):
    coarse, denoiser, x = case.backbone(precision="bf16"), backbone.load_denoiser(), noise_of(backbone, (0, 1))
    text = TextBatch.build(backbone.encode([TEXT] * 2), None, x.device)
    v, rounded = (
        one.velocity(denoiser, x, torch.full((2,), 0.6), text.sequence, text.pooled) for one in (backbone, coarse)
    )
    assert rounded.dtype == torch.float32 and 0 < (v - rounded).abs().max() < 0.05 * v.abs().max()
    images, rounded = (one.decode(x).astype(int) for one in (backbone, coarse))
    assert 0 < np.abs(images - rounded).mean() < 0.6


def test_only_text_layers_that_nothing_reads_are_left_without_gradient(backbone, trained):
    predict(backbone, trained, True).square().mean().backward()
    idle = {
        name.split(".lora_")[0] for name, one in adapter_parameters(trained[0], "default").items() if one.grad is None
    }
    last = "transformer_blocks.1."
    assert idle == {last + name for name in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}
