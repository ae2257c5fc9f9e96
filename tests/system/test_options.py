"""Settings that change how a run computes and not what."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..inprocess import Finished


@pytest.fixture
def run(tiny, in_process) -> Callable[..., Finished]:
    """Function (kind, *overrides) -> what the job of tiny.yaml ends with in this process."""
    return lambda kind, *overrides: in_process(tiny(kind, "cluster.learners=1", *overrides))


def weights(lora: Path) -> np.ndarray:
    return np.concatenate([value.ravel() for _, value in sorted(load_file(lora).items())])


def test_activations_that_are_computed_again_give_the_same_lora(run):
    assert run("grpo", "learner.gradient_checkpointing=true").checksums == run("grpo").checksums


def test_a_run_whose_samplers_merge_the_lora_ends_almost_in_the_same_one(run):
    merged, plain = (
        run("nft", "backbone.precision=fp32", "rollout.merge_lora=true"),
        run("nft", "backbone.precision=fp32", "rollout.merge_lora=false"),
    )
    ours, theirs = weights(merged.lora), weights(plain.lora)
    assert merged.checksums != plain.checksums and merged.before == plain.before
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_text_encoders_that_go_after_each_use_change_nothing(run):
    assert run("nft", "backbone.text=free").checksums == run("nft").checksums


def test_another_seed_ends_in_another_lora(run):
    assert run("nft", "seed=1").checksums != run("nft").checksums


def test_the_trust_region_is_measured_with_checkpointed_activations_too(run):
    shaping = "advantage.shaping={kind: slas, gamma: adaptive, bound: worst_case, refresh: 1}"
    checkpointing = ((), ("learner.gradient_checkpointing=true",))
    one, two = (run("grpo", "prompts_per_step=4", shaping, *more) for more in checkpointing)
    assert one.checksums == two.checksums


@pytest.mark.parametrize("use", ["train", "merge"])
def test_a_run_goes_on_from_the_lora_of_another_or_with_it_in_its_base(run, use):
    """Whose last scores are then its first ones; without a learning rate to speak of the LoRA stays what it was."""
    plain = "backbone.precision=fp32"
    first = run("grpo", plain, "backbone.lora.rank=4", "backbone.lora.alpha=8")
    more = run("grpo", plain, f"backbone.lora={{path: {first.lora.parent}, use: {use}}}", "optimizer.lr=1e-12")
    assert more.before == pytest.approx(first.after, abs=1e-5) and more.before != first.before
    assert more.self_check["max_abs_log_ratio"] < 1e-5
    if use == "train":
        np.testing.assert_allclose(weights(more.lora), weights(first.lora), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_a_base_that_is_cut_up_between_ranks_gives_a_ratio_of_one_in_bf16_too(tiny, train):
    run = train(tiny("grpo", "backbone.precision=bf16", "learner.zero_stage=3", "cluster.learners=2"))
    assert run.summary["self_check"] == {"max_abs_log_ratio": 0.0}
