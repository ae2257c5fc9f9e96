"""Wraps DeepSpeed: ZeRO 0-3 over trainable adapters, with any number of micro-batches per update, on CPU or GPU."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from ipaddress import ip_address

import psutil
import torch

from align_cluster.learner.settings import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # the names of the two tensors that AdamW keeps for each weight


def join(rank: int, world: int, address: str, port: int, device: str) -> None:
    """Join the learner's process group before an Engine is built; later calls in the same process change nothing.

    Ranks meet at `address` and `port` of rank 0, which listens there and on no other address.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_SIZE="1")
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.constants import default_pg_timeout as timeout

    if device == "cpu":
        # DeepSpeed would compile a shared-memory collective at run time, which takes a compiler and half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if ip_address(address).is_loopback:  # all ranks are on this machine
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", _interface(address))
    backend = "gloo" if device == "cpu" else "nccl"
    if not torch.distributed.is_initialized():
        store = _store(rank, world, address, port, timeout)
        torch.distributed.init_process_group(backend, timeout=timeout, rank=rank, world_size=world, store=store)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _store(rank: int, world: int, address: str, port: int, timeout: timedelta) -> torch.distributed.TCPStore:
    """Make the store that ranks meet in. PyTorch's own server would listen on all addresses, and it asks nobody."""
    listening = None
    if rank == 0:
        listening = socket.create_server((address, port)).detach()
    return torch.distributed.TCPStore(
        address, port, world, is_master=rank == 0, timeout=timeout, master_listen_fd=listening
    )


def _interface(address: str) -> str:
    """Return the name of this machine's network interface that has `address`."""
    found = psutil.net_if_addrs().items()
    return next(name for name, addresses in found if any(one.address == address for one in addresses))


def agree(sound: bool, device: torch.device) -> bool:
    """Tell whether all ranks are `sound`. All ranks must call it together."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return sound
    answer = torch.tensor(float(sound), device=device)
    torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN)
    return bool(answer)


class Engine:
    """Accumulates and clips gradients and steps AdamW over a module's trainable parameters.

    ZeRO averages gradients over ranks, so the caller scales each loss by the number of ranks over the total weight.
    """

    def __init__(self, module: torch.nn.Module, optimizer: OptimizerConfig, zero_stage: int) -> None:
        import deepspeed

        self.trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.stage = zero_stage
        self.adamw = torch.optim.AdamW(
            self.trainable, optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            model_parameters=self.trainable,
            optimizer=self.adamw,
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
        """Accumulate the gradient of one micro-batch. `last` marks the update's final one, the same on every rank."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def step(self, lr: float, sound: bool = True) -> float | None:
        """Apply the accumulated gradient and return its global norm before clipping.

        Returns None on every rank where the gradient is not finite, or where any rank says that its losses were not
        `sound`. The gradient is then dropped, and nothing changes.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        sound = agree(sound, self.trainable[0].device)
        if self.stage == 0:
            # Whole gradients in place; DeepSpeed would report no norm and apply any of them.
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
            if sound and torch.isfinite(norm):
                self.deepspeed.step()
                return float(norm)
            self.adamw.zero_grad()
            return None
        if not sound:  # a gradient of NaN makes DeepSpeed drop it together with everything that it has accumulated
            for partition in self.deepspeed.optimizer.averaged_gradients.values():
                for gradient in partition:
                    gradient.fill_(torch.nan)
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm()) if self.deepspeed.was_step_applied() else None

    def moments(self) -> tuple[int, dict[str, list[torch.Tensor]]]:
        """Return AdamW's steps so far and its moments by name, a whole fp32 tensor for each trainable parameter.

        All ranks must call it together.
        """
        steps = {int(state["step"]) for state in self._states()}
        return max(steps), {key: [self._whole(p, key) for p in self.trainable] for key in MOMENTS}

    def restore(self, weights: list[torch.Tensor], steps: int, moments: dict[str, list[torch.Tensor]]) -> None:
        """Take over whole tensors, as `moments` returns them, from any number of ranks and any stage."""
        import deepspeed

        with self.gathered(self.trainable, write=True):
            for parameter, value in zip(self.trainable, weights, strict=True):
                if parameter.numel():
                    parameter.copy_(value)
        # Except in stage 0, DeepSpeed steps fp32 masters of its own, which must follow.
        if self.stage in (1, 2):
            self.deepspeed.optimizer.refresh_fp32_params()
        elif self.stage == 3:
            for parameter, value in zip(self.trainable, weights, strict=True):
                deepspeed.utils.safe_set_local_fp32_param(parameter, _own_part(parameter, value))
        for state in self._states():
            state["step"].fill_(steps)
        for key, values in moments.items():
            for parameter, value in zip(self.trainable, values, strict=True):
                if self.stage == 0:
                    self.adamw.state[parameter][key].copy_(value)
                elif self.stage == 3:
                    deepspeed.utils.safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
                else:
                    deepspeed.utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _states(self) -> list[dict[str, torch.Tensor]]:
        """Return the state of each tensor that AdamW really steps: a parameter, or this rank's flat part of all of
        them.

        It makes the state, as torch would, where no step has made it yet.
        """
        optimizer = self.deepspeed.optimizer
        flat = self.trainable
        if self.stage:
            flat = (
                optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
            )
        for tensor in flat:
            if not self.adamw.state[tensor]:
                zeros = {key: torch.zeros_like(tensor) for key in MOMENTS}
                self.adamw.state[tensor].update(step=torch.zeros((), dtype=torch.float32), **zeros)
        if self.stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()  # lets the public functions find the state
        return [self.adamw.state[tensor] for tensor in flat]

    def _whole(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        import deepspeed

        if self.stage == 0:
            return self.adamw.state[parameter][key].detach()
        return deepspeed.utils.safe_get_full_optimizer_state(parameter, key)

    @contextmanager
    def gathered(self, parameters: list[torch.nn.Parameter], write: bool = False) -> Iterator[None]:
        """Make parameters whole inside the context; under ZeRO-3 all ranks must enter. With `write`, rank 0's values
        hold for all ranks afterwards."""
        if self.stage < 3:
            context = nullcontext()
        else:
            import deepspeed

            context = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)
        with context, torch.no_grad():
            yield


def _own_part(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a whole tensor under stage 3, which pads the last part."""
    size = parameter.ds_tensor.ds_numel
    flat = value.flatten()
    padded = torch.nn.functional.pad(flat, (0, size * torch.distributed.get_world_size() - len(flat)))
    return padded[size * torch.distributed.get_rank() :][:size].to(parameter.ds_tensor.device)
