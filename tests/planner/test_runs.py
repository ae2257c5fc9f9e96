"""Every run that can train can be counted. Tests loop over all backbones and algorithms, so new ones are covered."""

import pytest

from align_cluster.algorithms import ALGORITHMS
from align_cluster.backbones import BACKBONES
from align_cluster.config.load import loads
from align_cluster.config.plan import derive, settle
from align_cluster.config.run import RunConfig
from align_cluster.planner.fit import changed, learner_memory
from align_cluster.planner.memory import measure, predictions
from align_cluster.planner.meta_backbone import meta_backbone
from align_cluster.planner.report import estimate, image_flops, text
from align_cluster.rewards.clip import CLIPS

from ..backbones.contract import Case

TEXT = """\
name: counted
steps: 1
backbone: {kind: KIND, path: FOLDER, precision: fp32, lora: {rank: 4}}
prompts: {kind: embedded}
rollout: {group_size: 2, steps: 4, guidance: 2}
rewards: {clip: {kind: clip_score}}
algorithm: {kind: ALGORITHM}
evaluate: {prompts: {kind: embedded, split: held_out}}
"""


@pytest.fixture
def job(tiny_pipeline):
    """Function (backbone, algorithm, *overrides) -> a run on that backbone's tiny pipeline, with its batches chosen."""

    def make(kind: str, algorithm: str, *overrides: str) -> RunConfig:
        case = Case(kind, tiny_pipeline(kind))
        given = [f"backbone.{name}={value}" for name, value in getattr(case.tiny, "SETTINGS", {}).items()]
        run = TEXT.replace("KIND", kind).replace("FOLDER", str(case.folder)).replace("ALGORITHM", algorithm)
        return settle(loads(run, "run.yaml", [*given, *overrides]), 1, 0)

    return make


def asked(config: RunConfig) -> list[str | None]:
    return predictions(
        config, ALGORITHMS[config.algorithm.kind](config.algorithm), meta_backbone(config.backbone, "cpu")
    )


def test_the_predictions_of_every_loss_are_known(job):
    for kind, backbone in BACKBONES.items():
        for name, algorithm in ALGORITHMS.items():
            if backbone.flow or not algorithm.needs_flow:
                found = asked(job(kind, name))
                assert found.count("default") == 1 and found.index("default") == (1 if name == "nft" else 0), name


def test_a_loss_without_reference_asks_for_no_reference(job):
    assert asked(job("sd3", "nft")) == ["old", "default", None]
    assert asked(job("sd3", "nft", "algorithm.kl_beta=0")) == ["old", "default"]
    assert asked(job("sd3", "grpo")) == ["default", None]
    assert asked(job("sd3", "grpo", "algorithm.kl_beta=0")) == ["default"]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.exhaustive if kind == "sd1" else ()) for kind in BACKBONES]
)
def test_every_backbone_is_counted_with_a_critic(kind, job):
    config = job(kind, "ppo")
    plan = derive(config, 1, 0)
    sizes = measure(config, plan, "cpu")
    update, checkpointed = sizes.plain.update, sizes.checkpointed.update
    assert 0 < checkpointed.bytes < update.bytes and update.flops < checkpointed.flops
    assert sizes.draw.flops < update.flops, "backward costs something"
    assert sizes.plain.critic.flops > 0 and sizes.critic_trained > sizes.adapter


def test_a_critic_is_counted_apart_from_the_update(job):
    config, actor = job("flux", "ppo"), job("flux", "grpo", "algorithm.kl_beta=0")
    plan = derive(config, 1, 0)
    sizes, plain = (measure(one, plan, "cpu", alternatives=False) for one in (config, actor))
    assert plain.plain.update == sizes.plain.update
    assert learner_memory(config, plan, sizes).weights > learner_memory(config, plan, plain).weights
    assert image_flops(config, plan, sizes)["update"] > image_flops(actor, plan, plain)["update"]


def test_a_run_is_told_in_words(job):
    config = job("sd3", "nft")
    plan = derive(config, 2, 0)
    said = text(config, plan, estimate(config, plan))
    for words in ("LoRA", "of rank 4", "rollout : reward : update", "sampler", "with ZeRO 3", "with checkpointing"):
        assert words in said
    assert "seconds" not in said and "fits" not in said, "no GPUs are planned for"


def test_a_learner_that_follows_gradients_of_rewards_holds_the_vae_and_the_rewards_too(job):
    config = job("flux", "srpo", "rewards.clip.path=openai/clip-vit-large-patch14")
    plan = derive(config, 1, 0)
    sizes, other = measure(config, plan, "cpu"), measure(job("flux", "grpo", "algorithm.kl_beta=0"), plan, "cpu")
    decode, checkpointed = sizes.plain.reward_decode, sizes.checkpointed.reward_decode
    assert sizes.plain.update == other.plain.update and other.plain.reward_decode.bytes == 0
    assert 0 < checkpointed.bytes < decode.bytes and decode.flops > 2 * sizes.decode.flops
    held, plain = learner_memory(config, plan, sizes), learner_memory(config, plan, other)
    clip = CLIPS["openai/clip-vit-large-patch14"]
    assert held.weights == plain.weights + sizes.vae + 4 * clip.parameters
    assert plan.fold == 2, "both branches at once"
    in_a_pass = 2 * plan.micro_batch
    assert held.activations == plain.activations + decode.bytes + in_a_pass * clip.activations
    frugal = learner_memory(changed(config, "learner", gradient_checkpointing=True), plan, sizes)
    assert frugal.activations == sizes.checkpointed.update.bytes + checkpointed.bytes + clip.activations
    assert image_flops(config, plan, sizes)["update"] > image_flops(config, plan, other)["update"] + 2 * clip.flops
