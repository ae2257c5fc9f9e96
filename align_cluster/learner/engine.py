"""A small face on DeepSpeed: ZeRO 0-3 over trainable adapters, any number of micro-batches per update, CPU or GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from align_cluster.config.run import OptimizerConfig


def join(rank: int, world: int, address: str, port: int, device: str) -> None:
    """Join the learner's process group; once per process, before an Engine is built."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_SIZE="1")
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device == "cpu":
        # DeepSpeed would compile a shared-memory collective at run time, which takes a compiler and half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl", verbose=False)


class Engine:
    """Gradient accumulation, clipping and AdamW over a module's trainable parameters.

    ZeRO averages gradients over ranks, so the caller scales each loss by the number of ranks over the total weight.
    """

    def __init__(self, module: torch.nn.Module, optimizer: OptimizerConfig, zero_stage: int) -> None:
        import deepspeed

        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.stage = zero_stage
        client = torch.optim.AdamW(
            self.trainable, optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            model_parameters=self.trainable,
            optimizer=client,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": optimizer.max_grad_norm,
                "steps_per_print": 10**9,
                # The default bucket is made for whole models: 2 GB on every rank, whatever the adapter's size.
                "zero_optimization": {
                    "stage": zero_stage,
                    "reduce_bucket_size": sum(p.numel() for p in self.trainable),
                    # Its own linear layer rounds otherwise than torch's under autocast: ratios would not begin at 1.
                    "memory_efficient_linear": False,
                },
                "zero_allow_untested_optimizer": True,
            },
        )

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of one micro-batch; `last` marks the update's final one, the same on every rank."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def step(self, lr: float) -> float:
        """Apply the accumulated gradient; returns its global norm before clipping.

        Raises FloatingPointError on every rank, and changes nothing, where the gradient is not finite.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        # Stage 0 keeps whole gradients in place, reports no norm and would apply any gradient; the others skip a step.
        gradients = [parameter.grad for parameter in self.trainable if self.stage == 0 and parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            self.deepspeed.step()
        if not torch.isfinite(norm) or not self.deepspeed.was_step_applied():
            raise FloatingPointError("the gradient is not finite: lower optimizer.lr, or set backbone.precision: fp32")
        return float(norm if self.stage == 0 else self.deepspeed.get_global_grad_norm())

    @contextmanager
    def gathered(self, parameters: list[torch.nn.Parameter], write: bool = False) -> Iterator[None]:
        """Whole tensors inside; under ZeRO-3 all ranks must enter. With `write`, rank 0's values hold for all
        afterwards."""
        if self.stage < 3:
            context = nullcontext()
        else:
            import deepspeed

            context = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)
        with context, torch.no_grad():
            yield
