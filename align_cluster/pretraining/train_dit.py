"""The dit stage of pretraining: flow matching of the denoiser, jointly with the text encoder of the CLIP-G slot."""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import SD3Transformer2DModel
from transformers import CLIPModel, CLIPTextModelWithProjection

from align_cluster.files import write_json
from align_cluster.pretraining.networks import (
    GUIDE_TEXT,
    all_prompts,
    cosine,
    new_dit,
    new_tokenizer,
    save,
    text_config,
    tokenize,
)


@torch.no_grad()
def encode_frozen(clip: CLIPModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the CLIP-L slot as StableDiffusion3Pipeline reads it: (hidden_states[-2], projected pooled output)."""
    output = clip.text_model(input_ids=ids, output_hidden_states=True)
    return output.hidden_states[-2], clip.text_projection(output.pooler_output)


def warm_start(init: Path, dit: SD3Transformer2DModel, guide: CLIPTextModelWithProjection, drop_block: int) -> None:
    """Copy an earlier pipeline that has one encoder in both text slots.

    The guide inherits that encoder, and the DiT leaves out block `drop_block`.
    """
    from tokenizers import Tokenizer

    donor = SD3Transformer2DModel.from_pretrained(init / "transformer", dtype=torch.float32).state_dict()
    state, half = dit.state_dict(), GUIDE_TEXT[0]
    for name, value in state.items():
        source = name
        if name.startswith("transformer_blocks."):
            head, index, rest = name.split(".", 2)
            source = f"{head}.{int(index) + (int(index) >= drop_block)}.{rest}"
        old = donor[source]
        if value.shape == old.shape:
            value.copy_(old)
        else:  # both halves read the same text encoder: their sum belongs to the guide, the CLIP-L part starts at 0
            value.zero_()[:, -half:] = old[:, :half] + old[:, half:]
    dit.load_state_dict(state)
    encoder = CLIPTextModelWithProjection.from_pretrained(init / "text_encoder", dtype=torch.float32).state_dict()
    words = Tokenizer.from_file(str(init / "tokenizer" / "tokenizer.json")).get_vocab()
    mine = guide.state_dict()
    for name, value in mine.items():
        old = encoder[name]
        if "token_embedding" in name:
            for word, index in new_tokenizer().get_vocab().items():
                value[index] = old[words[word]] if word in words else old[words["<|unk|>"]]
        elif "position_embedding" in name:
            value.copy_(torch.cat([old, old[-1:].expand(len(value) - len(old), -1)]))
        else:
            value.copy_(old)
    guide.load_state_dict(mine)


class DitTrainer:
    """Trains the DiT and the CLIP-G text encoder by flow matching (v = noise - x0), with an EMA of both.

    This is process `rank` of `world`, with one thread. At this size, several such processes are faster than one process
    with several threads.
    """

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        torch.manual_seed(2)
        self.out, self.steps, self.lr, self.flat = args.out, args.dit_steps, args.lr, args.flat
        self.rank, self.world, self.batch = rank, args.workers, args.batch // args.workers
        self.dit = new_dit()
        self.guide = CLIPTextModelWithProjection(text_config(*GUIDE_TEXT, vocab=len(new_tokenizer())))
        if args.init:
            warm_start(args.init, self.dit, self.guide, args.drop_block)
        self.model = torch.nn.ModuleDict({"dit": self.dit, "guide": self.guide}).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        matrices = [p for n, p in self.dit.named_parameters() if p.ndim == 2 and "transformer_blocks" in n]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=self.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step = self.images_seen = 0
        self.ids = tokenize([*all_prompts(), ""])
        clip = CLIPModel.from_pretrained(self.out / "clip", dtype=torch.float32)
        self.frozen, self.frozen_pooled = encode_frozen(clip, self.ids)

    def condition(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sequence [B, 16, 192] and pooled [B, 192] of prompt rows; the last row is the empty prompt."""
        output = self.guide(input_ids=self.ids[rows], output_hidden_states=True)
        sequence = torch.cat([self.frozen[rows], output.hidden_states[-2]], -1)
        return sequence, torch.cat([self.frozen_pooled[rows], output.text_embeds], -1)

    def update(self, x0: torch.Tensor, rows: torch.Tensor) -> float:
        """Make one optimiser step on latents x0 [B, C, H, W] of the prompts `rows` [B], and return the loss."""
        factor = min(1, (self.step + 1) / 100) * cosine(min(1, self.step / self.steps), self.flat)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * factor
        rows = torch.where(torch.rand(len(rows)) < 0.1, len(self.ids) - 1, rows)
        sigma, noise = torch.sigmoid(torch.randn(len(x0))), torch.randn_like(x0)
        level = sigma.view(-1, 1, 1, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sequence, pooled = self.condition(rows)
            velocity = self.dit(
                hidden_states=(1 - level) * x0 + level * noise,
                encoder_hidden_states=sequence,
                pooled_projections=pooled,
                timestep=1000 * sigma,
                return_dict=False,
            )[0]
        loss = ((velocity.float() - (noise - x0)) ** 2).mean()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1:
            self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.images_seen += len(x0) * self.world
        return loss.item()

    def average_gradients(self) -> None:
        """Average the gradients over all processes."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.world).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def run(self, latents: torch.Tensor, owners: torch.Tensor, save_every: int = 500) -> None:
        """Train until the last step. Process 0 prints progress, and saves a state and the EMA weights."""
        state = self.out / "dit.pt"
        if state.exists():
            self.load(torch.load(state, weights_only=True))
        torch.manual_seed(3 + self.rank + 1000 * self.step)
        started, losses = time.monotonic(), []
        while self.step < self.steps:
            chosen = torch.randint(len(latents), (self.batch,))
            losses.append(self.update(latents[chosen].float(), owners[chosen]))
            if self.rank:
                continue
            if self.step % 100 == 0:
                mean, losses = sum(losses) / len(losses), []
                print(f"dit {self.step}/{self.steps} loss {mean:.4f} {time.monotonic() - started:.0f}s", flush=True)
            if self.step % save_every == 0 or self.step == self.steps:
                save(self.state(), state)
                self.export()

    def state(self) -> dict:
        """Return what a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counters": (self.step, self.images_seen),
        }

    def load(self, state: dict) -> None:
        """Continue from `state()` of an earlier run."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.images_seen = state["counters"]

    def export(self) -> None:
        """Write the EMA weights as diffusers and transformers folders."""
        self.ema["dit"].save_pretrained(self.out / "transformer")
        self.ema["guide"].save_pretrained(self.out / "guide")
        write_json(self.out / "seen.json", {"steps": self.step, "images": self.images_seen})
