"""Loss terms: pure functions of tensors, fp32, one value for each sample."""

import torch

MOST_LOG = 20.0  # ratios end at e^20: no clip range comes near it, and squares of gradients stay finite in fp32


def clipped_surrogate(
    log_ratio: torch.Tensor, advantage: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's pessimistic surrogate (Schulman et al. 2017, eq. 7) as a loss, and the ratio; all [B].

    Log-probs are means over latent dimensions, so the ratio is the true one to the power 1/D, and clip ranges are tiny.
    A sample with advantage 0, as a masked one has, adds exactly 0 to the loss and its gradient, whatever its ratio is.
    """
    counted = torch.where(advantage == 0, 0.0, log_ratio)
    ratio = torch.exp(counted.clamp(max=MOST_LOG))
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantage * ratio, -advantage * clipped), torch.exp(log_ratio)


def clipped_value_loss(values: torch.Tensor, before: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Return PPO's pessimistic value loss, like values [B, R] (Schulman et al.'s released code).

    It is the larger of two squared errors: that of the value, and that of the value held within `clip` of `before`,
    which it was before the updates.
    """
    held = before + (values - before).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def gaussian_kl(
    mean: torch.Tensor, mean_ref: torch.Tensor, std: torch.Tensor, std_t: torch.Tensor, mode: str
) -> torch.Tensor:
    """Return the KL [B] of two Gaussian steps with the same deviation [B], in the convention `mode`.

    exact_sum    sum_d (mu - mu_ref)^2 / (2 std^2)
    exact_mean   the mean over dimensions instead of the sum
    no_dt        the mean with std_t instead of std = std_t sqrt(-dt); Flow-GRPO's published coefficients refer to it
    """
    squares = ((mean - mean_ref) ** 2).flatten(1)
    if mode == "exact_sum":
        return squares.sum(1) / (2 * std**2)
    return squares.mean(1) / (2 * (std if mode == "exact_mean" else std_t) ** 2)


def guarded_log_ratio(
    x_next: torch.Tensor, mean: torch.Tensor, mean_old: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Return GRPO-Guard's normalised log-ratio [B] (arXiv 2510.22319): (log ratio + KL to the old step) x std.

    It has no bias and one scale at all noise levels. It is computed as mean_d((mu - mu_old) z) with z = (x_next -
    mu_old) / std, which is equal. The difference of two log-densities would round away a good part of the published
    clip range of 2e-6.
    """
    return ((mean - mean_old) * (x_next - mean_old)).flatten(1).mean(1) / std


def nft_policy_loss(
    v: torch.Tensor,
    v_old: torch.Tensor,
    x_t: torch.Tensor,
    sigma: torch.Tensor,
    x0: torch.Tensor,
    optimality: torch.Tensor,
    beta: float,
    advantage_clip: float,
) -> torch.Tensor:
    """Return DiffusionNFT's forward-process loss [B] (Zheng et al. 2025, arXiv 2509.16117, eq. 5).

    Its weights are those of the released code. v_pos = beta v + (1 - beta) v_old and v_neg = (1 + beta) v_old - beta v
    both regress onto x0. `optimality` r in [0, 1] [B] weighs the first, 1 - r the second. Each error is divided by its
    own mean absolute value, held constant.
    """
    level = sigma.view(-1, *[1] * (x_t.ndim - 1))

    def regression(velocity: torch.Tensor) -> torch.Tensor:
        error = (x_t - level * velocity - x0).flatten(1)
        weight = error.detach().double().abs().mean(1).clamp_min(1e-5)
        return (error**2).mean(1) / weight.float()

    positive = regression(beta * v + (1 - beta) * v_old)
    negative = regression((1 + beta) * v_old - beta * v)
    return (optimality * positive + (1 - optimality) * negative) * advantage_clip / beta
