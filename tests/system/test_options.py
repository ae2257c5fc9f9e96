"""Settings that change how a run computes and not what."""

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow


def weights(run) -> np.ndarray:
    return np.concatenate([value.ravel() for _, value in sorted(load_file(run.summary["lora_path"]).items())])


def test_activations_that_are_computed_again_give_the_same_lora(runs, tiny, train):
    run = train(tiny("grpo", "learner.gradient_checkpointing=true"))
    assert run.summary["lora_checksum"] == runs["grpo"].summary["lora_checksum"]


def test_a_run_whose_samplers_merge_the_lora_ends_almost_in_the_same_one(runs, tiny, train):
    run = train(tiny("nft", "rollout.merge_lora=true"))
    ours, theirs = weights(run), weights(runs["nft"])
    assert run.summary["lora_checksum"] != runs["nft"].summary["lora_checksum"]
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)
    assert run.summary["before"] == runs["nft"].summary["before"]


def test_text_encoders_that_go_after_each_use_change_nothing(runs, tiny, train, short_folder):
    run = train(tiny("nft", "backbone.text=free"))
    assert run.summary["lora_checksum"] == runs["nft"].summary["lora_checksum"]


def test_the_trust_region_is_measured_with_checkpointed_activations_too(tiny, train):
    adaptive = ("advantage.shaping.kind=slas", "advantage.shaping.gamma=adaptive", "advantage.shaping.refresh=1")
    one, two = (train(tiny("grpo", *adaptive, *more)) for more in ((), ("learner.gradient_checkpointing=true",)))
    assert one.summary["lora_checksum"] == two.summary["lora_checksum"]


def test_a_base_that_is_cut_up_between_ranks_gives_a_ratio_of_one_in_bf16_too(tiny, train):
    run = train(tiny("grpo", "backbone.precision=bf16", "learner.zero_stage=3", "cluster.learners=2"))
    assert run.summary["self_check"] == {"max_abs_log_ratio": 0.0}
