"""The critic's values on every backbone: where gradients go, and that nothing of the actor changes."""

import pytest
import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.base import CriticSection
from align_cluster.backbones.critic import Critic, CriticHead, captured
from align_cluster.backbones.noising import clean
from align_cluster.backbones.sd3 import SD3

from .contract import Case

SMALL = {"width": 16, "heads": 2}


def inputs(backbone, count=3):
    generator = torch.Generator().manual_seed(1)
    (condition,) = backbone.encode(["a photo of a red circle"])
    x = torch.randn(count, *backbone.latent_shape, generator=generator)
    sigma = torch.linspace(0.2, 0.9, count)
    if not backbone.flow:
        sigma = torch.tensor(backbone.sigmas(count)[:-1], dtype=torch.float32)
    sequence, pooled = (
        torch.tensor(part)[None].expand(count, *part.shape) for part in (condition.sequence, condition.pooled)
    )
    return x, sigma, sequence, pooled


def shake(critic, seed=5):
    """Random weights everywhere, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in critic.trainable:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=list(BACKBONES))
def case(request, tiny_pipeline):
    made = Case(request.param, tiny_pipeline(request.param))
    return made.backbone(lora={"rank": 2, "alpha": 4})


@pytest.fixture
def actor(case):
    return add_adapters(case, case.load_denoiser(), ("default", "critic"))


@pytest.mark.parametrize("features", ["lora", "frozen", "copy", "whole", "pixels"])
def test_a_new_critic_says_zero_and_a_trained_one_tells_latents_levels_and_texts_apart(case, actor, features):
    critic = Critic(case, actor, 2, CriticSection(features=features, **SMALL))
    x, sigma, sequence, pooled = inputs(case)
    assert critic(x, sigma, sequence, pooled).shape == (3, 2) and not critic(x, sigma, sequence, pooled).any()
    shake(critic)
    values = critic(x, sigma, sequence, pooled)
    for other in (
        critic(x + 1, sigma, sequence, pooled),
        critic(x, sigma.flip(0), sequence, pooled),
        critic(x, sigma, sequence + 1, pooled),
    ):
        assert (values - other).abs().max() > 1e-5
    alone = torch.cat([critic(*(part[row : row + 1] for part in (x, sigma, sequence, pooled))) for row in range(3)])
    torch.testing.assert_close(values, alone, rtol=1e-3, atol=1e-4)


def test_a_denoiser_whose_blocks_have_another_name_is_read_where_the_class_says_it():
    from diffusers import WanTransformer3DModel

    class Wan(SD3):
        critic_blocks = ("blocks",)

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "ffn_dim": 16, "freq_dim": 16}
    network = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, **sizes)
    backbone = Wan(SD3.Config(precision="fp32"))
    (middle, channels), (last, _) = backbone.taps(network)
    assert (middle, last) == (network.blocks[1], network.blocks[2])
    with captured(backbone, network) as layers:
        network(torch.randn(2, 4, 1, 8, 8), torch.tensor([500, 500]), torch.randn(2, 5, 8))
    assert [tuple(layer.shape) for layer in layers] == [(2, 16, channels)] * 2


def test_the_tokens_matter_as_soon_as_the_last_layer_has_moved(case, actor):
    critic = Critic(case, actor, 1, CriticSection(**SMALL))
    torch.nn.init.normal_(critic.head.last.weight, generator=torch.Generator().manual_seed(3))
    x, sigma, sequence, pooled = inputs(case)
    values = critic(x, sigma, sequence, pooled)
    assert (values - critic(x + 1, sigma, sequence, pooled)).abs().max() > 1e-4
    values.sum().backward()
    assert all(pool.read.weight.grad.abs().max() > 0 for pool in critic.head.pooling)


@pytest.mark.parametrize("features", ["lora", "frozen", "pixels"])
def test_the_critics_gradient_reaches_no_weight_of_the_actor_and_the_actors_none_of_the_critic(case, actor, features):
    critic = Critic(case, actor, 1, CriticSection(features=features, **SMALL))
    shake(critic)
    x, sigma, sequence, pooled = inputs(case)
    critic(x, sigma, sequence, pooled).sum().backward()
    default, own = adapter_parameters(actor, "default"), adapter_parameters(actor, "critic")
    assert all(parameter.grad is None for parameter in default.values())
    reached = [parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in own.values()]
    assert any(reached) == (features == "lora")
    assert all(parameter.grad is None for name, parameter in actor.named_parameters() if "lora_" not in name)
    for parameter in actor.parameters():
        parameter.grad = None
    case.velocity(actor, x, sigma, sequence, pooled).sum().backward()
    assert all(parameter.grad is None for parameter in own.values())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in default.values())


@pytest.mark.parametrize("features", ["lora", "copy"])
def test_with_gradient_checkpointing_values_and_gradients_are_the_same(case, actor, features):
    critic = Critic(case, actor, 1, CriticSection(features=features, **SMALL))
    shake(critic)
    found = []
    for _ in range(2):
        values = critic(*inputs(case))
        with critic.active():
            found.append((values.detach(), torch.autograd.grad(values.sum(), critic.trainable, allow_unused=True)))
        critic.network.train().enable_gradient_checkpointing()
    (plain, gradients), (values, again) = found
    assert torch.equal(plain, values)
    for one, other in zip(gradients, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_gradient_to_the_latent_is_that_of_finite_differences(case, actor):
    critic = Critic(case, actor, 1, CriticSection(**SMALL))
    shake(critic)
    x, sigma, sequence, pooled = (part.double() if part.ndim > 1 else part for part in inputs(case, 1))
    x, sequence, pooled = x.float(), sequence.float(), pooled.float()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    direction /= direction.norm()
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x, sigma, sequence, pooled).sum(), x)
    with torch.no_grad():
        up, down = (critic(x + sign * 0.05 * direction, sigma, sequence, pooled).double() for sign in (1, -1))
    slope = float((up - down).sum() / 0.1)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.05, abs=2e-3)


def test_the_actors_velocity_is_the_same_with_a_critic_beside_it(case, actor):
    bare = case.velocity(case.load_denoiser(), *inputs(case))
    critic = Critic(case, actor, 1, CriticSection(**SMALL))
    shake(critic)
    critic(*inputs(case))
    assert torch.equal(case.velocity(actor, *inputs(case)), bare)


@pytest.mark.parametrize("features", ["lora", "whole", "pixels"])
def test_a_state_restores_the_values_and_another_critics_is_refused(case, actor, features):
    critic = Critic(case, actor, 1, CriticSection(features=features, **SMALL))
    shake(critic)
    state = {name: value.clone() for name, value in critic.state().items()}
    values = critic(*inputs(case))
    shake(critic, 6)
    critic.restore(state)
    assert torch.equal(critic(*inputs(case)), values)
    other = Critic(case, actor, 2, CriticSection(**SMALL))
    with pytest.raises(ValueError, match="does not match"):
        other.restore(state)


@pytest.mark.parametrize(("setting", "place"), [("text", 2), ("text", 3), ("level", 1)])
def test_without_a_condition_the_critic_cannot_tell_it(case, actor, setting, place):
    """The base's own layers know the noise level; so only what the head sees of it is taken away."""
    values = []
    for known in (True, False):
        critic = Critic(case, actor, 1, CriticSection(**SMALL, **{setting: known}))
        shake(critic)
        given = list(inputs(case))
        if setting == "level":
            layers = [torch.randn(3, 5, pool.norm.normalized_shape[0]) for pool in critic.head.pooling]
            sigmas = [given[1], given[1].flip(0)] if known else [None, None]
            values.append([critic.head(layers, sigma) for sigma in sigmas])
            continue
        one = critic(*given)
        given[place] = given[place] + 1
        values.append([one, critic(*given)])
    (one, other), (blind, same) = values
    assert torch.equal(blind, same)
    assert not torch.equal(one, other) or not inputs(case)[place].numel()  # some have no pooled text


def test_a_whole_copy_begins_as_the_base_or_at_random_and_trains_every_weight_in_fp32(case, actor):
    base, copy = case.load_denoiser(), Critic(case, actor, 1, CriticSection(features="whole", **SMALL))
    section = CriticSection(features="whole", init="random", **SMALL)
    random, again = (Critic(case, actor, 1, section, seed=7) for _ in range(2))
    own = dict(base.named_parameters())
    assert {name for name in copy.named if name.startswith("network.")} == {f"network.{name}" for name in own}
    assert all(value.requires_grad and value.dtype == torch.float32 for value in copy.trainable)
    assert all(torch.equal(copy.named[f"network.{name}"], value.float()) for name, value in own.items())
    drawn = [name for name, value in own.items() if value.ndim > 1 and value.std() > 0]
    assert not any(torch.equal(random.named[f"network.{name}"], own[name].float()) for name in drawn)
    assert all(torch.equal(random.named[name], again.named[name]) for name in random.named)
    shake(copy)
    copy(*inputs(case)).sum().backward()
    reached = [value.grad is not None and value.grad.abs().max() > 0 for value in copy.network.parameters()]
    assert sum(reached) > 0.5 * len(reached)
    assert all(parameter.grad is None for parameter in actor.parameters())


def test_random_weights_that_nothing_would_train_are_refused():
    where = list(CriticSection(init="random").problems("algorithm.critic", None))
    assert len(where) == 1 and "set features to whole" in where[0]
    assert not list(CriticSection(init="random", features="whole").problems("algorithm.critic", None))


def test_pixels_are_those_of_the_image_that_one_step_of_the_base_predicts(case, actor):
    critic = Critic(case, actor, 1, CriticSection(features="pixels", **SMALL))
    shake(critic)
    x, sigma, sequence, pooled = inputs(case)
    bare = case.velocity(case.load_denoiser(), x, sigma, sequence, pooled)
    expected = case.pixels(clean(x, bare, sigma, case.prediction))
    tokens = critic.encoder(expected, sequence, None)
    torch.testing.assert_close(critic(x, sigma, sequence, pooled), critic.head([tokens], sigma), rtol=1e-4, atol=1e-5)
    _, _, height, width = expected.shape
    assert tokens.shape == (3, -(-height // 8) * -(-width // 8), 16)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x, sigma, sequence, pooled).sum(), x)
    assert gradient.abs().max() > 0  # guidance can follow it


def test_the_head_weighs_tokens_by_what_they_say_and_not_by_where_they_stand():
    torch.manual_seed(0)
    head = CriticHead([12, 8], 3, 16, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    layers, sigma = [torch.randn(4, 9, 12), torch.randn(4, 5, 8)], torch.rand(4)
    order = torch.randperm(9)
    torch.testing.assert_close(head(layers, sigma), head([layers[0][:, order], layers[1]], sigma), rtol=1e-4, atol=1e-5)
