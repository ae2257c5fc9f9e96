"""One rank that trains the embedded network, started by test_fisher_ranks.py:  fisher_worker.py RANK WORLD PORT OUT
CASE...

A CASE is "<stage>:<probe or plain>". Each rank pickles {case: [what an update left behind, ...]} to OUT.<rank>.
"""

import pickle
import sys
from pathlib import Path

import torch

from align_cluster.backbones.adapters import adapter_parameters, add_adapters
from align_cluster.backbones.sd3 import SD3
from align_cluster.learner.engine import Engine, join
from align_cluster.learner.fisher import FisherProbe, probing
from align_cluster.learner.settings import OptimizerConfig

UPDATES, SAMPLES = 2, 4


def average(flat: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(flat)
    return flat / torch.distributed.get_world_size()


def run(case: str, rank: int, world: int, port: int) -> list[dict]:
    join(rank, world, "127.0.0.1", port, "cpu")
    stage, kind = case.split(":")
    backbone = SD3(SD3.Config(precision="fp32", lora={"rank": 2, "alpha": 3}))
    denoiser = add_adapters(backbone, backbone.load_denoiser(), ["default"])
    parameters = adapter_parameters(denoiser, "default")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=g))
    probe = FisherProbe(list(parameters.values()), seed=1)
    # AdamW would blow the rounding of vanishing gradients up to the learning rate: eps is well above them.
    engine = Engine(denoiser, OptimizerConfig(lr=1e-3, eps=1e-4, max_grad_norm=0.01), int(stage))
    mine = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)

    def forward(network: torch.nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, deviation and log-prob of a step of this rank's samples, which `seed` names."""
        g = torch.Generator().manual_seed(seed)
        widths = denoiser.config.joint_attention_dim, denoiser.config.pooled_projection_dim
        x, noise = torch.randn(2, SAMPLES, *backbone.latent_shape, generator=g)[:, mine]
        sequence = torch.randn(SAMPLES, 7, widths[0], generator=g)[mine]
        pooled = torch.randn(SAMPLES, widths[1], generator=g)[mine]
        std = torch.tensor([0.3, 0.4, 0.5, 0.6])[mine]
        mean = x - 0.5 * backbone.velocity(network, x, std, sequence, pooled)
        wide = std.view(-1, 1, 1, 1)
        after = (mean + wide * noise).detach()
        return mean, std, (-((after - mean) ** 2) / (2 * wide**2)).flatten(1).mean(1)

    left = []
    for update in range(UPDATES):
        engine.backward(forward(engine.deepspeed, 10 * update)[2].mean(), last=False)
        found = None
        if kind == "probe":  # between two micro-batches, where a disturbed gradient would show
            with probing():
                step = forward(denoiser, 10 * update + 1)
            found = probe.estimate(*step, reduce=average)
        engine.backward(forward(engine.deepspeed, 10 * update + 2)[2].mean(), last=True)
        norm = engine.step(1e-3)
        values = {name: parameter.detach().clone().numpy() for name, parameter in parameters.items()}
        left.append({"found": found, "vector": probe.vector.numpy(), "norm": norm, "values": values})
    return left


def main() -> None:
    torch.set_num_threads(1)
    rank, world, port = (int(value) for value in sys.argv[1:4])
    results = {case: run(case, rank, world, port) for case in sys.argv[5:]}
    Path(f"{sys.argv[4]}.{rank}").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
