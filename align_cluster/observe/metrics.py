"""The one vocabulary of metric names: what every number that a run writes is called, means and is measured in.

A name is a path of segments; `<...>` in a pattern stands for exactly one segment. The first pattern that fits wins,
so the special cases stand above the general ones.
"""

import difflib
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Metric:
    """One declared name: `unit` is a short label for an axis ("" where the number has none)."""

    pattern: str
    unit: str
    meaning: str


METRICS = (
    Metric("reward/<name>/mean", "score", "mean over the step's training images with a valid score"),
    Metric("reward/<name>/std", "score", "deviation over the step's training images with a valid score"),
    Metric("reward/<name>/failed", "images", "training images of the step that scoring failed on"),
    Metric("reward/<name>/failed/<kind>", "images", "those of one kind of failure"),
    Metric("reward/correlation/<name>/<other>", "", "correlation of two rewards over the step's training images"),
    Metric("reward/<name>/images_per_s", "images/s", "speed of one worker while it computes this reward"),
    Metric("reward/<name>/<task>", "score", "mean over the step's training images of one task"),
    Metric("group/reward_std_mean", "score", "spread of the combined reward inside a group, mean over groups"),
    Metric("group/std_across_noises", "score", "spread over initial noises at a fixed condition, mean over all"),
    Metric("group/std_across_conditions", "score", "spread over conditions at a fixed initial noise, mean over all"),
    Metric("group/original_std", "score", "spread inside a group's images drawn under the prompt itself"),
    Metric("group/perturbed_std", "score", "spread inside a group's images drawn under perturbed conditions"),
    Metric("group/original_mean", "score", "mean reward of images drawn under the prompt itself"),
    Metric("group/perturbed_mean", "score", "mean reward of images drawn under perturbed conditions"),
    Metric("group/zero_std_ratio", "fraction", "share of groups whose members all score the same: they teach nothing"),
    Metric("group/masked", "fraction", "share of images left out of the group statistics because a score failed"),
    Metric("images/contrast", "", "deviation of an image's pixels, of 0 to 1, mean over images"),
    Metric("images/diversity", "", "deviation of a pixel between a chunk's images, of 0 to 1, mean over pixels"),
    Metric("advantage/abs_mean", "", "mean magnitude of the advantages, after shaping"),
    Metric("advantage/gamma", "", "SLAS's exponent less 1 that shaped this step's advantages"),
    Metric("advantage/sum", "", "sum of a group's advantages, mean magnitude: 0 unless they are shaped"),
    Metric("slas/gamma", "", "adaptive exponent for the next step"),
    Metric("slas/moment", "", "M(gamma): mean |u|^(2 + 2 gamma), the trust region's left side"),
    Metric("slas/bound", "", "Bd, the largest moment that keeps the update in its trust region"),
    Metric("slas/step_kl", "nats/dim", "KL by which the measured update moved the policy"),
    Metric("slas/lambda_max", "", "largest eigenvalue of the Fisher matrix a latent dimension, on the LoRA"),
    Metric("slas/score_norm", "", "bound on the norm of a sample's score gradient"),
    Metric("explore/anchor_cosine", "", "cosine of perturbed prompt embeddings to the original, mean"),
    Metric("explore/pairwise_cosine", "", "cosine between the perturbed embeddings of a prompt, mean"),
    Metric("scoring/<pool>/queue", "images", "most images that were drawn and not yet scored"),
    Metric("scoring/<pool>/batch_fill", "fraction", "images scored together over the batch size, mean"),
    Metric("scoring/<pool>/p50", "s", "from an image drawn to its score: half of the chunks take longer"),
    Metric("scoring/<pool>/p95", "s", "the same: one chunk in twenty takes longer"),
    Metric("scoring/<pool>/workers", "workers", "reward workers of the pool at the end of the step's scoring"),
    Metric("time/step", "s", "wall time of the step: its stages together"),
    Metric("time/learner", "s", "part of the update that the learner ranks spent computing"),
    Metric("time/<stage>", "s", "wall time that the step spent in this stage"),
    Metric("train/skipped", "updates", "updates that changed nothing because loss or gradient was not finite"),
    Metric("train/empty", "updates", "updates that changed nothing because all their samples are masked"),
    Metric(
        "train/critic_skipped", "fraction", "share of the critic's updates that were not finite and changed nothing"
    ),
    Metric("train/loss", "", "loss, mean over the step's images and denoising steps"),
    Metric("train/kl", "", "distance from the base model: KL a dimension; NFT: squared velocity gap"),
    Metric("train/grad_norm", "", "gradient norm before clipping, largest of the step"),
    Metric("train/log_ratio_max", "nats/dim", "largest |log ratio| of the policy to the one that drew"),
    Metric("train/first_log_ratio_max", "nats/dim", "the same before the step's first update, where it must be 0"),
    Metric("train/clip_high", "fraction", "share of ratios above the clip range"),
    Metric("train/clip_low", "fraction", "share of ratios below the clip range"),
    Metric("train/reward", "score", "reward whose gradient the update followed: SRPO's relative one, both branches"),
    Metric("train/satisfied", "fraction", "share of samples at algorithm.margin or above, which have no gradient"),
    Metric("train/preference", "score", "SRPO: score under the positive control word less that under the negative one"),
    Metric("train/recovery", "", "SRPO: RMS distance of the recovered x0 from the true one"),
    Metric("train/value_loss", "", "critic's loss, mean over the step's images and denoising steps"),
    Metric("train/critic_grad_norm", "", "critic's gradient norm before clipping, largest of the step"),
    Metric("value/actor", "", "1 where the actor learned too, 0 while only the critic did"),
    Metric("value/<name>/explained_variance", "fraction", "share of a reward's variance that the critic explains"),
    Metric("value/<name>/explained_variance/<levels>", "fraction", "the same at these noise levels"),
    Metric("value/<name>/correlation/<step>", "", "correlation of the value at a denoising step with the reward"),
    Metric("advantage/step/<step>", "", "mean magnitude of the advantages of one denoising step, before whitening"),
    Metric("train/old_gap", "", "squared velocity difference of the policy to its lagged copy (NFT)"),
    Metric("lr", "", "learning rate, mean over the step's updates"),
    Metric("throughput/images_per_s", "images/s", "training images over the step's wall time"),
    Metric("weights/bytes", "bytes", "size of the published weight buffer"),
    Metric("weights/adopt_s", "s", "from publishing to the last sampler's receipt"),
    Metric("weights/version", "version", "policy version that the samplers hold after the step"),
)


def _fits(pattern: str, name: str) -> bool:
    wanted, given = pattern.split("/"), name.split("/")
    return len(wanted) == len(given) and all(
        part and (part == want or want.startswith("<")) for want, part in zip(wanted, given, strict=True)
    )


@cache
def describe(name: str) -> Metric:
    """The declaration of metric `name`; ValueError with the nearest declared name where there is none."""
    for metric in METRICS:
        if _fits(metric.pattern, name):
            return metric
    near = difflib.get_close_matches(name, [metric.pattern for metric in METRICS], n=1)
    hint = f"; the nearest declared name is {near[0]!r}" if near else ""
    raise ValueError(f"metric {name!r} is not declared in align_cluster/observe/metrics.py{hint}")
