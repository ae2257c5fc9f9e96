"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): forward-process policy optimisation without likelihoods."""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from align_cluster.algorithms.base import KL, Algorithm, Batch, Policy
from align_cluster.algorithms.terms import nft_policy_loss
from align_cluster.rollouts.denoise import initial_noise
from align_cluster.settings import Root, Section
from align_cluster.types import Metric


class NFT(Algorithm):
    """DiffusionNFT: the adapter regresses towards good samples and away from bad ones, without log-probs.

    Samplers draw with its lagged copy "old".
    """

    class Config(Section):
        """Configures DiffusionNFT."""

        kind: Literal["nft"] = "nft"
        beta: PositiveFloat = 1.0
        """How far the loss's positive and negative policies stand from the old one, as a multiple of the new one's
        distance. Smaller values keep them nearer to it and leave the first gradient as it is. DiffusionNFT uses 1 for
        GenEval, PickScore and HPS, and 0.1 for OCR and several rewards."""
        kl_beta: Annotated[float, Field(ge=0)] = 1e-4
        """The weight of the squared velocity difference from the base model in the loss; 0 saves its network pass.
        DiffusionNFT uses 1e-4."""
        advantage_clip: PositiveFloat = 5.0
        """The bound on |advantage|. Advantages from -advantage_clip to advantage_clip become an optimality from 0 to 1.
        DiffusionNFT uses 5."""
        advantage_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
        """Which advantages count: all, those above or below 0 only (the others become 0), 1 for every one above 0 and
        else 0 (`one_only`), or their signs (`binary`). DiffusionNFT's default is all."""
        timesteps: PositiveInt | None = None
        """The number of noise levels at which an update visits each sample. Null takes 99 % of the rollout's, as
        DiffusionNFT does; fewer make updates faster."""
        old: Literal["on_policy", "slow", "late"] = "slow"
        """How the adapter that samplers draw with follows the trained one: it keeps a share of itself after each step.
        That is 0 with `on_policy`, min(.001 u, .5) at update u with `slow` (GenEval, preference rewards), and 0 before
        update 75 and then min(.0075 (u - 75), .999) with `late` (OCR, several rewards). All three are
        DiffusionNFT's."""

        def problems(self, where: str, run: Root) -> Iterator[str]:
            """Refuse more noise levels than a rollout has."""
            steps = run.rollout.steps
            if self.timesteps and self.timesteps > steps:
                yield (
                    f"{where}.timesteps is {self.timesteps}, and a rollout has {steps} noise levels; "
                    f"set it to at most {steps}, or leave it out"
                )

        def notes(self, where: str, run: Root) -> Iterator[str]:
            """Note a policy without lag that is drawn with older weights all the same."""
            if self.old == "on_policy" and run.loop.ahead:
                yield (
                    f"{where}.old is on_policy, and loop.ahead 1 draws each step with the weights of one step before; "
                    "set loop.ahead to 0 for images of the very policy that is trained"
                )

    needs_density = False
    needs_flow = True
    default_step = "dpm2"
    behaviour = "old"
    adapters = ("default", "old")
    metrics = (Metric("train/old_gap", "", "squared velocity difference of the policy to its lagged copy (NFT)"), KL)

    def inner_passes(self, steps: int, recorded: int) -> int:
        """Each inner pass visits one noise level."""
        return min(steps, self.config.timesteps or max(1, int(0.99 * steps)))

    def optimality(self, advantages: torch.Tensor) -> torch.Tensor:
        """Return r in [0, 1]: the advantage after its mode, mapped from [-clip, clip]."""
        clip, mode = self.config.advantage_clip, self.config.advantage_mode
        a = advantages.clamp(-clip, clip)
        if mode == "positive_only":
            a = a.clamp_min(0)
        elif mode == "negative_only":
            a = a.clamp_max(0)
        elif mode == "one_only":
            a = (a > 0).float()
        elif mode == "binary":
            a = a.sign()
        return (a / (2 * clip) + 0.5).clamp(0, 1)

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss regresses on x0 at one noise level, plus `kl_beta` times the squared distance to the base."""
        # Each sample visits a random permutation of the rollout's own levels, one in each inner pass, with fresh noise.
        levels = torch.from_numpy(batch.sigmas[:-1]).float()
        orders = [torch.randperm(len(levels), generator=g) for g in batch.generators("order", shared=True)]
        visited = [order[number] for order, number in zip(orders, batch.passes, strict=True)]
        sigma = levels[torch.stack(visited)].to(batch.x0.device)
        noise = initial_noise(batch.generators("noise"), batch.x0.shape[1:]).to(batch.x0.device)
        level = sigma.view(-1, *[1] * (batch.x0.ndim - 1))
        x_t = (1 - level) * batch.x0 + level * noise
        lagged = None if policy.follows("old") else policy.velocity(x_t, sigma, "old")
        v = policy.velocity(x_t, sigma)
        v_old = v.detach() if lagged is None else lagged
        loss = nft_policy_loss(
            v,
            v_old,
            x_t,
            sigma,
            batch.x0,
            self.optimality(batch.advantages),
            self.config.beta,
            self.config.advantage_clip,
        )
        metrics = {"old_gap": ((v.detach() - v_old) ** 2).flatten(1).mean(1)}
        if self.config.kl_beta:
            kl = ((v - policy.velocity(x_t, sigma, None)) ** 2).flatten(1).mean(1)
            loss, metrics["kl"] = loss + self.config.kl_beta * kl, kl.detach()
        return loss, metrics

    def old_decay(self, updates: int) -> float:
        """The decay follows the schedule that `old` names."""
        if self.config.old == "on_policy":
            return 0.0
        if self.config.old == "slow":
            return min(0.001 * updates, 0.5)
        return 0.0 if updates < 75 else min(0.0075 * (updates - 75), 0.999)
