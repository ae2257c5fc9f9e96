"""From latents to rewards: the image that the run would draw, the scores that its reward workers would give, and a
gradient that finite differences agree with."""

import numpy as np
import pytest
import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.sd3 import SD3
from align_cluster.learner.policy import RewardGradient
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rewards.jpeg import Jpeg
from align_cluster.types import Prompt

from ..backbones.contract import Case

JUDGED = ["a photo of a red circle", "a photo of a red circle on a light background", "a drawing of four stars"]
TEXTS = [JUDGED] * 3  # of each image


def made(frugal=False, precision="fp32", **rewards):
    backbone = SD3(SD3.Config(precision=precision))
    return RewardGradient(backbone, rewards or {"clip": ClipScore.Config()}, 1, frugal)


@pytest.fixture(scope="module")
def latents():
    from align_cluster.embedded import scene
    from align_cluster.embedded.render import render

    records = scene.prompts("color_attr", "held_out")[:3]
    return SD3(SD3.Config(precision="fp32")).latents(render(list(records), 0).float() / 255)


def test_scores_are_those_of_the_images_that_a_sampler_would_decode(latents):
    rewards, reward = made(), ClipScore(ClipScore.Config())
    reward.load("cpu", 1)
    images = rewards.backbone.decode(latents)
    found = rewards(latents, TEXTS)
    assert found.shape == (3, 3) and found.dtype == torch.float32
    for column, text in enumerate(JUDGED):
        scores = reward.score(images, [Prompt(0, text)] * 3).values
        np.testing.assert_allclose(found[:, column], scores, rtol=0, atol=3e-3)  # there the image is rounded to bytes


def test_rewards_are_summed_by_their_weights(latents):
    both = made(one=ClipScore.Config(weight=2.0), other=ClipScore.Config(weight=-0.5, scale="srpo"))
    factor = both.parts[1][1].factor
    torch.testing.assert_close(both(latents, TEXTS), (2.0 - 0.5 * factor) * made()(latents, TEXTS))


def gradient(rewards, latents):
    leaf = latents.clone().requires_grad_()
    weights = torch.tensor([[1.0, -1.0, 0.5], [0.2, 1.0, -1.0], [0.0, 1.0, 0.0]])
    (rewards(leaf, TEXTS) * weights).sum().backward()
    assert all(parameter.grad is None for parameter in rewards.backbone._vae.parameters())
    return leaf.grad, lambda x: (rewards(x, TEXTS) * weights).sum()


def test_the_gradient_to_the_latents_is_that_of_finite_differences(latents):
    found, value = gradient(made(), latents)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        step = 1e-2 * torch.randn(latents.shape, generator=generator)
        with torch.no_grad():
            slope = (value(latents + step) - value(latents - step)) / 2
        assert slope.item() == pytest.approx((found * step).sum().item(), rel=0.03, abs=2e-4)


def test_computing_activations_twice_changes_neither_score_nor_gradient(latents):
    plain, frugal = made(), made(frugal=True)
    torch.testing.assert_close(frugal(latents, TEXTS), plain(latents, TEXTS), rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient(frugal, latents)[0], gradient(plain, latents)[0], rtol=0, atol=1e-5)


def test_computing_activations_twice_keeps_few_of_them(latents):
    many = latents.repeat(4, 1, 1, 1)

    def kept(rewards):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = rewards(many.clone().requires_grad_(), TEXTS * 4)
        assert held.requires_grad
        return sum(sizes.values())

    assert kept(made(frugal=True)) < kept(made()) / 50


def test_bf16_points_the_same_way(latents):
    exact, half = (gradient(made(precision=precision), latents)[0].flatten() for precision in ("fp32", "bf16"))
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.95


def test_a_reward_without_a_gradient_has_nothing_to_ask(latents):
    with pytest.raises(AttributeError):
        made(jpeg=Jpeg.Config())(latents, TEXTS)


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_sends_gradients_through_its_decoder_and_reads_images(kind, tiny_pipeline):
    case = Case(kind, tiny_pipeline(kind))
    grads = []
    for frugal in (False, True):
        backbone = case.backbone()
        rewards = RewardGradient(backbone, {"clip": ClipScore.Config()}, 1, frugal)
        x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        rewards(x, TEXTS[:2]).sum().backward()
        grads.append(x.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3 * grads[0].abs().max().item())
    images = (backbone.pixels(x.detach()) / 2 + 0.5).clamp(0, 1)
    again = backbone.latents(images)
    assert again.shape == x.shape and again.dtype == torch.float32 and not again.requires_grad


def test_every_image_is_judged_under_its_own_texts(latents):
    own = [[JUDGED[0]], [JUDGED[2]], [JUDGED[1]]]
    table = made()(latents, TEXTS)
    torch.testing.assert_close(made()(latents, own)[:, 0], torch.stack([table[0, 0], table[1, 2], table[2, 1]]))
    frugal = made(frugal=True)(latents, own)
    torch.testing.assert_close(frugal, made()(latents, own), rtol=0, atol=1e-5)
