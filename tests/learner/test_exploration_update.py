"""The decoupled update: whatever conditions samples were drawn under, the learner knows the prompt's own alone.

A real learner with one rank in this process. Its AdamW is set so that a step is the gradient itself, which tests then
read off the weights.
"""

import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from align_cluster.backbones.adapters import adapter_parameters
from align_cluster.conditions.exploration import E2po
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.learner.batching import TrainingChunk, make_micro_batches, rank_work
from align_cluster.learner.worker import Learner
from align_cluster.prompts.groups import plan_step
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.rollouts.steps import Dpm2, FlowSde
from align_cluster.rollouts.windows import Window
from align_cluster.types import Condition, Perturbation, Prompt, Record
from align_cluster.weights import publish

TEXT, STEPS, RHO = "a photo of a red circle", 4, 0.4
NOISES, CONDITIONS = 2, 3
SIZE = NOISES * CONDITIONS
(CHUNK,) = plan_step([Prompt(0, TEXT)], 7, 0, 1, NOISES, SIZE, CONDITIONS)
ADVANTAGES = np.array([1.0, -0.5, 2.0, -1.5, 0.3, -0.8], dtype=np.float32)
SCALE = 1e4  # of lr and eps: AdamW's lr g / (|g| + eps) is then g, to four digits where |g| is below 1
SDE = DrawRequest(
    1, STEPS, FlowSde.Config(), window=Window((0, 1, 2, 3), (0, 1, 2), 3), means=True, exploration=E2po(rho=RHO)
)
ODE = DrawRequest(1, STEPS, Dpm2.Config(), exploration=E2po(rho=RHO))
ALGORITHMS = {
    "nft": {"kind": "nft", "timesteps": 3, "kl_beta": 0.1, "old": "slow"},
    "grpo": {"kind": "grpo", "kl_beta": 0.0},
    "guard": {"kind": "grpo", "kl_beta": 0.0, "ratio": "guard"},
}
SEEN = {"seen": {}, "seen static": {"schedule": "static"}}  # settings of updates under perturbed conditions, by name


def settings(kind: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "decoupled",
            "steps": 9,
            "prompts_per_step": 1,
            "backbone": {"kind": "sd3", "precision": "fp32", "lora": {"rank": 4, "alpha": 6}},
            "prompts": {"kind": "embedded"},
            "rollout": {"group_size": NOISES, "steps": STEPS, "chunk": SIZE},
            "exploration": {"conditions": CONDITIONS, "rho": RHO}
            | ({"update": "perturbed"} | SEEN[kind] if kind in SEEN else {}),
            "rewards": {"clip": {"kind": "clip_score"}},
            "algorithm": ALGORITHMS["nft" if kind in SEEN else kind],
            "optimizer": {"lr": SCALE, "eps": SCALE, "betas": [0, 0], "weight_decay": 0, "max_grad_norm": 1e9},
            "learner": {"zero_stage": 0, "ema": 0},
            "evaluate": {"prompts": {"kind": "embedded", "split": "held_out"}},
        }
    )


def weights(denoiser: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Adapter weights far from zero, B included."""
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(p.shape) for name, p in adapter_parameters(denoiser, "default").items()}
    return {name: (0.2 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def make_learner() -> Iterator[Callable[[str], Learner]]:
    """A function from an algorithm to a learner with one rank. Its environment goes with the module; the process group
    stays, since DeepSpeed can use no second one in a process."""
    environment, learners = dict(os.environ), {}

    def make(kind: str) -> Learner:
        if kind not in learners:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            learners[kind] = Learner(settings(kind).learner_setup, 0, 1, "127.0.0.1", port)
        return learners[kind]

    yield make
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    """A sampler with weights 1, the ones that learners train."""
    made = Sampler(settings("grpo").backbone)
    made.adopt(*publish(weights(made.denoiser, 0), 1))
    return made


@pytest.fixture(scope="module")
def condition(sampler) -> Condition:
    return sampler.encode([TEXT])[0]


@pytest.fixture(scope="module")
def perturbation(sampler):
    return sampler.perturb([TEXT], E2po(conditions=CONDITIONS, iterations=40), 0)[0]


@pytest.fixture(scope="module")
def records(sampler, condition, perturbation) -> dict[str, Record]:
    """What samplers send of an explored group, by algorithm."""
    ode, sde = (
        sampler.draw(CHUNK, {TEXT: condition}, None, request, {TEXT: perturbation})[2] for request in (ODE, SDE)
    )
    return {"nft": ode, "grpo": replace(sde, means=None), "guard": sde}


def update(
    learner: Learner, record: Record, condition: Condition, perturbation: Perturbation | None = None
) -> tuple[dict[str, torch.Tensor], dict]:
    """(gradient by parameter, metrics) of one update from the sampler's weights; the old adapter lags behind them."""
    for adapter, seed in (("default", 0), ("old", 1)):
        parameters, state = adapter_parameters(learner.denoiser, adapter), weights(learner.denoiser, seed)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(state[name]))
    parameters = adapter_parameters(learner.denoiser, "default")
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    cut = make_micro_batches([ADVANTAGES], [np.ones(SIZE, bool)], bounds=[0, SIZE], size=SIZE)
    metrics = learner.update(rank_work(0, cut, [TrainingChunk(record, {TEXT: condition}, {TEXT: perturbation})]))
    return {name: before[name] - parameter.detach() for name, parameter in parameters.items()}, metrics


def largest_gap(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest difference of two gradients, as a share of the larger one's largest entry."""
    assert first.keys() == second.keys()
    gap = max(float((first[name] - second[name]).abs().max()) for name in first)
    return gap / max(float(values.abs().max()) for values in first.values())


def test_a_record_carries_nothing_of_the_conditions_that_it_was_drawn_under(records, condition, perturbation):
    own = [perturbation.key, *(row.tobytes() for row in (*perturbation.hidden[:, 1], *perturbation.pooled))]
    original = [condition.key, condition.sequence[1].tobytes(), condition.pooled.tobytes()]
    for record in records.values():
        sent = pickle.dumps(record)
        for secret in own + original:
            assert (secret.encode() if isinstance(secret, str) else secret) not in sent
        assert record.chunk.variants == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", sorted(ALGORITHMS))
def test_the_update_depends_on_a_condition_only_through_what_was_drawn(make_learner, records, condition, kind):
    learner, record = make_learner(kind), records[kind]
    gradient, metrics = update(learner, record, condition)
    assert max(float(values.abs().max()) for values in gradient.values()) > 1e-3
    plain = replace(record, chunk=replace(CHUNK, rows=tuple(replace(row, variant=0) for row in CHUNK.rows)))
    same, same_metrics = update(learner, plain, condition)
    assert all(torch.equal(gradient[name], same[name]) for name in gradient)
    timed = ("seconds",)
    assert {k: v for k, v in metrics.items() if k not in timed} == {
        k: v for k, v in same_metrics.items() if k not in timed
    }


@pytest.mark.parametrize("kind", sorted(ALGORITHMS))
def test_an_update_under_a_perturbed_condition_would_be_another(
    make_learner, sampler, records, condition, perturbation, kind
):
    gradient, _ = update(make_learner(kind), records[kind], condition)
    other, _ = update(make_learner(kind), records[kind], sampler.backbone.insert(condition, perturbation, 1))
    assert largest_gap(gradient, other) > 0.05


def test_an_update_that_sees_perturbed_conditions_weighs_them_by_the_trained_level(
    make_learner, sampler, records, condition, perturbation
):
    """At full strength everywhere it is the plain update of samples under their own perturbed condition; with fading it
    is another, and neither is the decoupled one. A perturbation that is none gives the decoupled update's bits."""
    record = records["nft"]
    all_first = replace(CHUNK, rows=tuple(replace(row, variant=1) for row in CHUNK.rows))
    one = replace(record, chunk=all_first)
    static, _ = update(make_learner("seen static"), one, condition, perturbation)
    by_hand, _ = update(make_learner("nft"), one, sampler.backbone.insert(condition, perturbation, 1))
    assert largest_gap(static, by_hand) < 1e-5
    fading, _ = update(make_learner("seen"), one, condition, perturbation)
    decoupled, _ = update(make_learner("nft"), one, condition)
    assert largest_gap(static, decoupled) > 0.05 and largest_gap(fading, static) > 0.05
    assert largest_gap(fading, decoupled) > 0.01
    originals = replace(record, chunk=replace(CHUNK, rows=tuple(replace(row, variant=0) for row in CHUNK.rows)))
    same, _ = update(make_learner("seen"), originals, condition, perturbation)
    plain, _ = update(make_learner("nft"), originals, condition)
    assert all(torch.equal(same[name], plain[name]) for name in plain)


def test_a_metric_that_the_algorithm_does_not_declare_is_refused_before_anything_changes(
    make_learner, records, condition, monkeypatch
):
    learner = make_learner("nft")
    monkeypatch.setattr(type(learner.algorithm), "metrics", type(learner.algorithm).metrics[1:])
    with pytest.raises(UserError, match="nft: its loss returns the metric 'old_gap'.*NFT.metrics.*\"train/old_gap\""):
        update(learner, records["nft"], condition)
    state = weights(learner.denoiser, 0)
    for name, parameter in adapter_parameters(learner.denoiser, "default").items():
        np.testing.assert_array_equal(parameter.detach().numpy(), state[name])


@pytest.mark.parametrize("kind", ["grpo", "guard"])
def test_at_the_rollouts_weights_every_log_ratio_is_exactly_zero(make_learner, records, condition, kind):
    _, metrics = update(make_learner(kind), records[kind], condition)
    _, count, largest = metrics["first_log_ratio"]
    assert largest == 0.0 and count == SIZE * 3
    assert metrics["clip_high"][2] == metrics["clip_low"][2] == 0


@pytest.mark.parametrize("kind", ["grpo", "guard"])
def test_the_gradient_is_that_of_advantage_weighted_densities_under_the_original_condition(
    make_learner, sampler, records, condition, perturbation, kind
):
    """- mean of A grad log p(x_next | x, original condition), without a weight for the perturbation; by hand."""
    gradient, _ = update(make_learner(kind), records[kind], condition)
    record, parameters = records[kind], adapter_parameters(sampler.denoiser, "default")

    def by_hand(texts: list[Condition]) -> dict[str, torch.Tensor]:
        sequence, pooled = (torch.from_numpy(np.stack([getattr(t, n) for t in texts])) for n in ("sequence", "pooled"))
        loss = 0.0
        for k in range(3):
            x, x_next = (torch.from_numpy(part[:, k]) for part in (record.before, record.after))
            sigma, sigma_next = (float(level) for level in record.sigmas[k : k + 2])
            v = sampler.backbone.velocity(sampler.denoiser, x, torch.full((SIZE,), sigma), sequence, pooled).double()
            dt, divisor = sigma_next - sigma, 1 - (sigma if sigma < 1 else float(record.sigmas[1]))
            std_t = 0.7 * (sigma / divisor) ** 0.5
            std = std_t * (-dt) ** 0.5
            mean = x * (1 + std_t**2 / (2 * sigma) * dt) + v * (1 + std_t**2 * (1 - sigma) / (2 * sigma)) * dt
            log_prob = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).mean(1)
            weight = std / -dt if kind == "guard" else 1.0  # GRPO-Guard's ratio is p^std, its loss divided by -dt
            loss = loss - weight * (torch.from_numpy(ADVANTAGES) * log_prob).sum() / (3 * SIZE)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    assert largest_gap(by_hand([condition] * SIZE), gradient) < 1e-3
    drawn_under = [sampler.backbone.insert(condition, perturbation, variant) for variant in CHUNK.variants]
    assert largest_gap(by_hand(drawn_under), gradient) > 0.05


def test_under_another_condition_the_ratio_would_not_be_one(make_learner, sampler, records, condition, perturbation):
    _, metrics = update(make_learner("grpo"), records["grpo"], sampler.backbone.insert(condition, perturbation, 1))
    assert metrics["first_log_ratio"][2] > 1e-3
