"""Through which branch of a guided prediction gradients flow, on the embedded network."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.levels import sd3_sigmas
from align_cluster.backbones.sd3 import SD3
from align_cluster.config.run import RunConfig
from align_cluster.learner.batching import TrainingChunk
from align_cluster.learner.worker import Learner
from align_cluster.rollouts.guidance import TextBatch, guided_velocity
from align_cluster.types import Condition, Prompt, Record

from ..drawing import chunk_of

GUIDANCE, COUNT, STEP = 4.5, 2, 0.05
BLOCKS = ("transformer_blocks.0.attn.to_q.", "transformer_blocks.2.attn.add_v_proj.", "transformer_blocks.4.attn.to_v.")


@pytest.fixture(scope="module")
def network(settings):
    """(backbone, denoiser) with an adapter in fp32 whose A and B are both away from zero."""
    backbone = SD3(settings)
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ["default"])
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(denoiser, "default").values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
    return backbone, denoiser


@pytest.fixture(scope="module")
def inputs(network):
    """(x, sigma, weights of a scalar loss, a prompt's condition, the empty prompt's)."""
    backbone, denoiser = network
    g, widths = torch.Generator().manual_seed(1), (7, denoiser.config.joint_attention_dim)
    x, weights = torch.randn(2, COUNT, *backbone.latent_shape, generator=g)
    conditions = [
        Condition(key, torch.randn(widths, generator=g).numpy(), torch.randn(widths[1], generator=g).numpy())
        for key in ("text", "null")
    ]
    return x, torch.tensor([0.9, 0.6]), weights, *conditions


def learner(network, settings, branches: str) -> Learner:
    """A learner whose engine is the bare network."""
    made = object.__new__(Learner)
    made.backbone, made.denoiser = network
    made.engine, made.reward_gradient = SimpleNamespace(deepspeed=made.denoiser), None
    made.setup = RunConfig.model_validate(
        {
            "name": "test",
            "steps": 1,
            "backbone": settings.model_dump(),
            "prompts": {"kind": "embedded"},
            "rewards": {"geneval": {"kind": "geneval"}},
            "algorithm": {"kind": "grpo"},
            "rollout": {"guidance": GUIDANCE},
            "learner": {"guidance_gradient": branches},
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}},
        }
    ).learner_setup
    return made


def record() -> Record:
    chunk = chunk_of(Prompt(0, ""), range(COUNT))
    return Record(chunk, 0, np.empty(0), sd3_sigmas(6, 3.0), np.empty((COUNT, 0), dtype=np.int64))


def predict(network, inputs, null_gradient: bool) -> torch.Tensor:
    x, sigma, _, condition, null = inputs
    text = TextBatch.build([condition] * COUNT, null, x.device)
    return guided_velocity(*network, x, sigma, text, GUIDANCE, null_gradient)


def slope(network, output: torch.Tensor, inputs) -> dict[str, torch.Tensor]:
    """Gradient of the weighted sum of an output, for each parameter of the adapter."""
    parameters = adapter_parameters(network[1], "default")
    return dict(zip(parameters, torch.autograd.grad((output * inputs[2]).sum(), parameters.values()), strict=True))


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in gradient.values()])


def branch(network, inputs, condition: Condition) -> dict[str, torch.Tensor]:
    """Gradient of one branch alone."""
    x, sigma = inputs[:2]
    text = TextBatch.build([condition] * COUNT, None, x.device)
    return slope(network, guided_velocity(*network, x, sigma, text), inputs)


def rise(network, inputs, name: str, direction: torch.Tensor) -> float:
    """Central difference of the weighted sum of the prediction as one parameter moves along a unit vector."""
    parameter, values = adapter_parameters(network[1], "default")[name], []
    with torch.no_grad():
        start = parameter.clone()
        for shift in (STEP, -STEP):
            parameter.copy_(start + shift * direction)
            values.append((predict(network, inputs, True).double() * inputs[2].double()).sum().item())
        parameter.copy_(start)
    return (values[0] - values[1]) / (2 * STEP)


def test_the_prediction_has_the_same_bits_whichever_branch_carries_gradient(network, inputs):
    detached, whole = predict(network, inputs, False), predict(network, inputs, True)
    assert torch.equal(detached, whole) and detached.requires_grad and whole.requires_grad
    with torch.no_grad():
        assert torch.equal(predict(network, inputs, True), whole)


def test_with_a_detached_null_branch_the_gradient_is_guidance_times_the_text_branchs(network, inputs):
    found = flat(slope(network, predict(network, inputs, False), inputs))
    expected = GUIDANCE * flat(branch(network, inputs, inputs[3]))
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


def test_with_both_branches_the_gradient_is_the_weighted_sum_of_theirs(network, inputs):
    text, null = (flat(branch(network, inputs, condition)) for condition in inputs[3:])
    found = flat(slope(network, predict(network, inputs, True), inputs))
    expected = GUIDANCE * text + (1 - GUIDANCE) * null
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
    assert float(null.norm()) > 0.1 * float(text.norm())  # so a lost branch would be seen


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("block", BLOCKS)
def test_only_the_gradient_of_both_branches_is_that_of_finite_differences(network, inputs, block, part):
    (name,) = (name for name in adapter_parameters(network[1], "default") if block in name and part in name)
    both, detached = (slope(network, predict(network, inputs, whole), inputs)[name] for whole in (True, False))
    for direction in (both, both - detached):  # the second is what a lost branch would leave out
        direction = direction / direction.norm()
        measured = rise(network, inputs, name, direction)
        assert float((both * direction).sum()) == pytest.approx(measured, abs=2e-3 * float(both.norm()))
    assert abs(float((detached * direction).sum()) - measured) > 0.05 * float(both.norm())


@pytest.mark.parametrize("branches", ["cond_only", "both"])
def test_the_setting_reaches_the_gradient_of_the_learners_policy(network, inputs, settings, branches):
    policy = learner(network, settings, branches)._policy(
        TrainingChunk(record(), {"": inputs[3]}), inputs[4], slice(0, COUNT)
    )
    found = policy.velocity(*inputs[:2])
    expected = predict(network, inputs, branches == "both")
    assert torch.equal(found, expected)
    assert torch.equal(flat(slope(network, found, inputs)), flat(slope(network, expected, inputs)))
    assert not policy.velocity(*inputs[:2], None).requires_grad
