"""The one vocabulary of metric names: what every number that a run writes is called, means and is measured in.

Here are the names that every run has, or that a stage of the loop writes. What an algorithm's loss returns is declared
by its class (`metrics`), and `describe` knows both.

A name is a path of segments; `<...>` in a declared name stands for exactly one segment. The first declaration that fits
wins, so the special cases stand above the general ones.
"""

import difflib
from collections.abc import Iterator

from align_cluster.algorithms import ALGORITHMS
from align_cluster.types import Metric

# What the learner reports of a step, whatever the algorithm is; `source` is its own name of the number.
LEARNER = (
    Metric("train/loss", "", "loss, mean over the step's images and denoising steps"),
    Metric("train/grad_norm", "", "gradient norm before clipping, largest of the step", "largest"),
    Metric(
        "train/first_log_ratio_max",
        "nats/dim",
        "largest |log ratio| before the step's first update, where it must be 0",
        "largest",
        "first_log_ratio",
    ),
    Metric(
        "train/stale_log_ratio_max",
        "nats/dim",
        "the same of a step that was drawn one update earlier: how far that update moved the policy",
        "largest",
        "stale_log_ratio",
    ),
    Metric("train/value_loss", "", "critic's loss, mean over the step's images and denoising steps"),
    Metric("train/critic_grad_norm", "", "critic's gradient norm before clipping, largest of the step", "largest"),
    Metric(
        "train/critic_skipped", "fraction", "share of the critic's updates that were not finite and changed nothing"
    ),
    Metric("train/skipped", "updates", "updates that changed nothing because loss or gradient was not finite"),
    Metric("train/empty", "updates", "updates that changed nothing because all their samples are masked"),
    Metric("lr", "", "learning rate, mean over the step's updates"),
    Metric("time/learner", "s", "part of the update that the learner ranks spent computing", source="seconds"),
)
METRICS = (
    *LEARNER,
    Metric("reward/<name>/mean", "score", "mean over the step's training images with a valid score"),
    Metric("reward/<name>/std", "score", "deviation over the step's training images with a valid score"),
    Metric("reward/<name>/spread", "score", "deviation inside a group of a prompt's images, mean over groups"),
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
    Metric("group/masked", "fraction", "share of images left out of the group statistics: no score, or not finite"),
    Metric("rollout/non_finite", "images", "training images of the step whose latents or pixels are NaN or infinite"),
    Metric("images/contrast", "", "deviation of an image's pixels, of 0 to 1, mean over images"),
    Metric("images/diversity", "", "deviation of a pixel between a group's images, of 0 to 1, mean over pixels"),
    Metric("advantage/abs_mean", "", "mean magnitude of the advantages, after shaping"),
    Metric("advantage/gamma", "", "SLAS's exponent less 1 that shaped this step's advantages"),
    Metric("advantage/moment", "", "mean |u|^(2 + 2 gamma) of an update's scaled linear advantages, largest"),
    Metric("advantage/sum", "", "sum of a group's advantages, mean magnitude: 0 unless they are shaped"),
    Metric("slas/gamma", "", "exponent that the worst-case bound allows from the next step on"),
    Metric("slas/moment", "", "the same over the measured step, the left side of SLAS's worst-case bound"),
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
    Metric("time/<stage>", "s", "wall time that the step spent in this stage"),
    Metric("value/actor", "", "1 where the actor learned too, 0 while only the critic did"),
    Metric("value/replay/images", "images", "images whose states the critic learns from"),
    Metric("value/replay/updates", "updates", "updates that the critic made from them in this step"),
    Metric("value/replay/age", "steps", "how many steps ago they were drawn, mean"),
    Metric("value/<name>/held_out", "fraction", "explained variance below noise 0.5, last steps' held-out prompts"),
    Metric("value/<name>/explained_variance", "fraction", "share of a reward's variance that the critic explains"),
    Metric("value/<name>/explained_variance/<levels>", "fraction", "the same at these noise levels"),
    Metric("value/<name>/correlation/<step>", "", "correlation of the value at a denoising step with the reward"),
    Metric("advantage/step/<step>", "", "mean magnitude of the advantages of one denoising step, before whitening"),
    Metric("throughput/images_per_s", "images/s", "training images over the step's wall time"),
    Metric("throughput/images_per_gpu_s", "images/s", "the same for each GPU that the run holds"),
    Metric("idle/samplers", "fraction", "share of the step that samplers wait, mean over samplers"),
    Metric("idle/learners", "fraction", "share of the step that the learner waits"),
    Metric("idle/rewards", "fraction", "share of the step that reward workers wait, mean over workers"),
    Metric("staleness", "updates", "steps of training by which the weights that drew the step's images are older"),
    Metric("weights/bytes", "bytes", "size of the published weight buffer"),
    Metric("weights/adopt_s", "s", "from publishing to the last sampler's receipt"),
    Metric("weights/version", "version", "policy version that the samplers hold after the step"),
)

# What trackers get besides the numbers of steps: held-out scores, and every few seconds what the run does. The latter
# goes to Prometheus alone.
TRACKED = (
    Metric("held_out/reward/<name>", "score", "mean over the images of the last held-out evaluation"),
    Metric("held_out/reward/<name>/<detail>", "score", "the same of a detail of the reward"),
    Metric("run/step", "", "step at work, from 1; 0 before the first one"),
    Metric("run/steps", "steps", "steps that the run will have"),
    Metric("run/step_began_at", "s", "time of day at which the step at work began, in seconds since 1970"),
    Metric("workers/<pool>/ready", "workers", "workers of a pool that can work now"),
    Metric("workers/<pool>/lost", "workers", "workers of a pool that were lost since the driver started"),
    Metric("workers/<pool>/started", "workers", "workers of a pool that were started, those in place of lost ones too"),
    Metric("guard/<rule>/broken", "steps", "steps in a row, up to the last one, that broke a rule of the guard"),
)


def _fits(pattern: str, name: str) -> bool:
    wanted, given = pattern.split("/"), name.split("/")
    return len(wanted) == len(given) and all(
        part and (part == want or want.startswith("<")) for want, part in zip(wanted, given, strict=True)
    )


def declared() -> Iterator[Metric]:
    """Yield all declarations, the special ones first: those of every algorithm, and the general ones."""
    for algorithm in ALGORITHMS.values():
        yield from algorithm.metrics
    yield from METRICS
    yield from TRACKED


def describe(name: str) -> Metric:
    """Return the declaration of metric `name`; ValueError with the nearest declared name where there is none."""
    for metric in declared():
        if _fits(metric.pattern, name):
            return metric
    near = difflib.get_close_matches(name, [metric.pattern for metric in declared()], n=1)
    hint = f"; the nearest declared name is {near[0]!r}" if near else ""
    raise ValueError(
        f"metric {name!r} is not declared, neither in align_cluster/observe/metrics.py nor by an algorithm{hint}"
    )
