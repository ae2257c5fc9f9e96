"""Loss terms: pure functions of tensors, fp32, one value a sample."""

import torch


def clipped_surrogate(
    log_ratio: torch.Tensor, advantage: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's pessimistic surrogate (Schulman et al. 2017, eq. 7) as a loss, and the ratio; all [B].

    Log-probs are means over latent dimensions, so the ratio is the true one to the power 1/D and clip ranges are tiny.
    """
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def clipped_value_loss(values: torch.Tensor, before: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """PPO's pessimistic value loss, like values [B, R]: the larger of the squared errors of the value and of the value
    held within `clip` of what it was before the updates (Schulman et al.'s released code)."""
    held = before + (values - before).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def gaussian_kl(
    mean: torch.Tensor, mean_ref: torch.Tensor, std: torch.Tensor, std_t: torch.Tensor, mode: str
) -> torch.Tensor:
    """KL [B] of two Gaussian steps with the same deviation [B], in one of three conventions (algorithm settings name
    them).

    exact_sum: sum_d (mu - mu_ref)^2 / (2 std^2). exact_mean: the mean over dimensions. no_dt: the mean with std_t
    instead of std = std_t sqrt(-dt), which is what Flow-GRPO's published coefficients refer to.
    """
    squares = ((mean - mean_ref) ** 2).flatten(1)
    if mode == "exact_sum":
        return squares.sum(1) / (2 * std**2)
    return squares.mean(1) / (2 * (std if mode == "exact_mean" else std_t) ** 2)


def guarded_log_ratio(
    x_next: torch.Tensor, mean: torch.Tensor, mean_old: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """GRPO-Guard's normalised log-ratio [B] (arXiv 2510.22319): (log ratio + KL to the old step) x std, without bias
    and on one scale at all noise levels.

    Computed as mean_d((mu - mu_old) z) with z = (x_next - mu_old) / std, which is the same: the difference of two
    log-densities would round away a good part of the published clip range of 2e-6.
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
    """DiffusionNFT's forward-process loss [B] (Zheng et al. 2025, arXiv 2509.16117, eq. 5, with the released code's
    weights).

    v_pos = beta v + (1 - beta) v_old and v_neg = (1 + beta) v_old - beta v both regress onto x0; `optimality` r in
    [0, 1] [B] weighs the first, 1 - r the second. Each error is divided by its own mean absolute value, held constant.
    """
    level = sigma.view(-1, *[1] * (x_t.ndim - 1))

    def regression(velocity: torch.Tensor) -> torch.Tensor:
        error = (x_t - level * velocity - x0).flatten(1)
        weight = error.detach().double().abs().mean(1).clamp_min(1e-5)
        return (error**2).mean(1) / weight.float()

    positive = regression(beta * v + (1 - beta) * v_old)
    negative = regression((1 + beta) * v_old - beta * v)
    return (optimality * positive + (1 - optimality) * negative) * advantage_clip / beta
