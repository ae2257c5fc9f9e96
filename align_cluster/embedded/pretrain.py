"""How the embedded pipeline was made: `python -m align_cluster.embedded.pretrain --out DIR`.

Four stages, each resumable (finished stages are skipped, the last one continues from its newest state):

    clip   CLIPModel on rendered images and captions: the reward model, and the frozen CLIP-L slot
    vae    AutoencoderKL, factor 4, 8 channels
    dit    SD3Transformer2DModel and, jointly, the text encoder of the CLIP-G slot, by flow matching
    pack   everything in fp16 as a StableDiffusion3Pipeline folder, at most 10 MB

`--init DIR` starts the vae and dit stages from another packed folder. Recipe, time and result of the shipped
weights stand in README.md beside this file.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from align_cluster.embedded import scene
from align_cluster.embedded.render import SIZE, render
from align_cluster.embedded.tokenizer import MAX_LENGTH, build

LATENT_CHANNELS, WIDTH, LAYERS, HEADS = 8, 128, 5, 4
CLIP_TEXT, GUIDE_TEXT = (64, 2), (128, 3)  # (width, layers) of the two text encoders
TASK_WEIGHTS = (0.14, 0.16, 0.16, 0.16, 0.16, 0.16, 0.06)


def text_config(width: int, layers: int, vocab: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )


def new_clip() -> CLIPModel:
    text = text_config(*CLIP_TEXT, vocab=len(build())).to_dict()
    vision = dict(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=8
    )
    vision["projection_dim"] = CLIP_TEXT[0]
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_TEXT[0]))


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    with torch.no_grad():  # a posterior that starts narrow trains several times faster
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5.0
        vae.encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
    return vae


def new_dit() -> SD3Transformer2DModel:
    joint = CLIP_TEXT[0] + GUIDE_TEXT[0]
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=joint,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=joint,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )


def draw_records(count: int, rng: random.Random) -> list[dict]:
    tasks = rng.choices(scene.TASKS, TASK_WEIGHTS, k=count)
    return [rng.choice(scene.prompts(task, "train")) for task in tasks]


def tokenize(prompts: list[str]) -> torch.Tensor:
    batch = build()(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return batch["input_ids"]


def data_set(out: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images uint8 [N, 3, 48, 48], index of each image's prompt in `all_prompts()`), rendered once and cached."""
    path = out / f"images_{count}.pt"
    if not path.exists():
        index = {prompt: i for i, prompt in enumerate(all_prompts())}
        rng, images, owners = random.Random(0), [], []
        for start in range(0, count, 1024):
            records = draw_records(min(1024, count - start), rng)
            images.append(render(records, seed=start))
            owners += [index[record["prompt"]] for record in records]
        save((torch.cat(images), torch.tensor(owners)), path)
    return torch.load(path)


def all_prompts() -> list[str]:
    return [record["prompt"] for task in scene.TASKS for record in scene.prompts(task, "train")]


def save(value: object, path: Path) -> None:
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def cosine(progress: float, flat: float = 0.0) -> float:
    """Learning-rate factor: 1 until `flat`, then a half cosine down to 2 %."""
    if progress < flat:
        return 1.0
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (progress - flat) / (1 - flat)))


def train_clip(out: Path, images: torch.Tensor, owners: torch.Tensor, steps: int, batch: int = 192) -> None:
    torch.manual_seed(0)
    model, ids = new_clip(), tokenize(all_prompts())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1, step / 100) * cosine(step / steps)
        chosen = torch.randint(len(images), (batch,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen, read = clip_features(model, images[chosen], ids[owners[chosen]])
        logits = model.logit_scale.exp().clamp(max=100) * seen @ read.T
        same = (owners[chosen][:, None] == owners[chosen][None]).fill_diagonal_(False)
        logits = logits.masked_fill(same, -1e4)  # the same caption twice in a batch is no negative
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"clip {step}/{steps} loss {loss:.3f}", flush=True)
    model.eval().save_pretrained(out / "clip")


def clip_features(model: CLIPModel, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L2-normalised (image, text) features, each [B, projection]; images are uint8."""
    seen = model.get_image_features(pixel_values=images.float() / 127.5 - 1)
    read = model.get_text_features(input_ids=ids)
    seen, read = (getattr(feature, "pooler_output", feature).float() for feature in (seen, read))
    return F.normalize(seen, dim=-1), F.normalize(read, dim=-1)


def train_vae(out: Path, vae: AutoencoderKL, images: torch.Tensor, steps: int, batch: int = 32) -> None:
    torch.manual_seed(1)
    vae = vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 50) * cosine(step / steps)
        x = pixels(images[torch.randint(len(images), (batch,))])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
        kl = posterior.kl().mean() / (LATENT_CHANNELS * (SIZE // 4) ** 2)
        loss = (y - x).abs().mean() + ((y - x) ** 2).mean() + 0.5 * edges + 2e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"vae {step}/{steps} loss {loss:.4f}", flush=True)
    vae.eval()
    with torch.no_grad():
        means = torch.cat([vae.encode(pixels(part)).latent_dist.mean for part in images[:2048].split(128)])
    vae.register_to_config(scaling_factor=float(1 / means.std()), shift_factor=float(means.mean()))
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out / "vae")


def pixels(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_latents(out: Path, images: torch.Tensor) -> torch.Tensor:
    """Normalised posterior means, fp16 [N, 8, 12, 12], cached."""
    path = out / f"latents_{len(images)}.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(out / "vae").to(memory_format=torch.channels_last)
        shift, scale, parts = vae.config.shift_factor, vae.config.scaling_factor, []
        for part in images.split(256):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mean = vae.encode(pixels(part)).latent_dist.mean.float()
            parts.append(((mean - shift) * scale).half())
        save(torch.cat(parts), path)
    return torch.load(path)


@torch.no_grad()
def encode_frozen(clip: CLIPModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The CLIP-L slot as StableDiffusion3Pipeline reads it: (hidden_states[-2], projected pooled output)."""
    output = clip.text_model(input_ids=ids, output_hidden_states=True)
    return output.hidden_states[-2], clip.text_projection(output.pooler_output)


def warm_start(init: Path, dit: SD3Transformer2DModel, guide: CLIPTextModelWithProjection, drop_block: int) -> None:
    """Copy an earlier pipeline whose two text slots held one encoder: the guide inherits it, the DiT loses a block."""
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
            for word, index in build().get_vocab().items():
                value[index] = old[words[word]] if word in words else old[words["<|unk|>"]]
        elif "position_embedding" in name:
            value.copy_(torch.cat([old, old[-1:].expand(len(value) - len(old), -1)]))
        else:
            value.copy_(old)
    guide.load_state_dict(mine)


class DitTrainer:
    """Flow matching (v = noise - x0) of the DiT and the CLIP-G text encoder, with an EMA of both.

    `rank` of `world` processes, one thread each: faster than one process with as many threads at this size.
    """

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        torch.manual_seed(2)
        self.out, self.steps, self.lr, self.flat = args.out, args.dit_steps, args.lr, args.flat
        self.rank, self.world, self.batch = rank, args.workers, args.batch // args.workers
        self.dit = new_dit()
        self.guide = CLIPTextModelWithProjection(text_config(*GUIDE_TEXT, vocab=len(build())))
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
        """Sequence [B, 16, 192] and pooled [B, 192] text features of prompt rows; the last row is the empty prompt."""
        output = self.guide(input_ids=self.ids[rows], output_hidden_states=True)
        sequence = torch.cat([self.frozen[rows], output.hidden_states[-2]], -1)
        return sequence, torch.cat([self.frozen_pooled[rows], output.text_embeds], -1)

    def update(self, x0: torch.Tensor, rows: torch.Tensor) -> float:
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
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.world).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def run(self, latents: torch.Tensor, owners: torch.Tensor, save_every: int = 500) -> None:
        state = self.out / "dit.pt"
        if state.exists():
            self.load(torch.load(state))
        torch.manual_seed(3 + self.rank + 1000 * self.step)
        started, losses = time.time(), []
        while self.step < self.steps:
            chosen = torch.randint(len(latents), (self.batch,))
            losses.append(self.update(latents[chosen].float(), owners[chosen]))
            if self.rank:
                continue
            if self.step % 100 == 0:
                mean, losses = sum(losses) / len(losses), []
                print(f"dit {self.step}/{self.steps} loss {mean:.4f} {time.time() - started:.0f}s", flush=True)
            if self.step % save_every == 0 or self.step == self.steps:
                save(self.state(), state)
                self.export()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counters": (self.step, self.images_seen),
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.images_seen = state["counters"]

    def export(self) -> None:
        self.ema["dit"].save_pretrained(self.out / "transformer")
        self.ema["guide"].save_pretrained(self.out / "guide")
        (self.out / "seen.json").write_text(json.dumps({"steps": self.step, "images": self.images_seen}))


def train_dit(rank: int, args: argparse.Namespace) -> None:
    if args.workers > 1:
        torch.set_num_threads(1)
        store = f"file://{(args.out / f'rendezvous_{os.getppid()}').resolve()}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.workers)
    images, owners = data_set(args.out, args.images)
    DitTrainer(args, rank).run(encode_latents(args.out, images), owners)


def pack(out: Path) -> Path:
    """Write OUT/pipeline (a StableDiffusion3Pipeline folder) and OUT/pipeline/clip in fp16; returns the folder."""
    target = out / "pipeline"
    shutil.rmtree(target, ignore_errors=True)
    clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32)
    frozen = CLIPTextModelWithProjection(text_config(*CLIP_TEXT, vocab=len(build())))
    source, state = clip.state_dict(), frozen.state_dict()
    for name in state:
        state[name] = source[name if name in source else f"text_model.{name}"]
    frozen.load_state_dict(state)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(out / "transformer").half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(out / "vae").half(),
        text_encoder=frozen.half(),
        tokenizer=build(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(out / "guide").half(),
        tokenizer_2=build(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(target)
    clip.half().save_pretrained(target / "clip")
    build().save_pretrained(target / "clip")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"packed {target}: {size / 1e6:.2f} MB")
    if size > 10_000_000:
        raise RuntimeError(f"the packed pipeline has {size} bytes, more than the 10 MB that may ship")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="working folder; the result is OUT/pipeline")
    parser.add_argument("--init", type=Path, help="packed folder to start the VAE and the DiT from")
    parser.add_argument("--drop-block", type=int, default=2, help="with --init: DiT block that is left out")
    parser.add_argument("--images", type=int, default=131072, help="rendered training images")
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--dit-steps", type=int, default=30000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--flat", type=float, default=0.3, help="part of the DiT steps before the cosine decay")
    parser.add_argument("--workers", type=int, default=2, help="data-parallel processes of the dit stage")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images, owners = data_set(args.out, args.images)
    if not (args.out / "clip" / "config.json").exists():
        train_clip(args.out, images, owners, args.clip_steps)
    if not (args.out / "vae" / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(args.init / "vae", dtype=torch.float32) if args.init else new_vae()
        train_vae(args.out, vae, images, args.vae_steps)
    encode_latents(args.out, images)
    if args.workers > 1:
        torch.multiprocessing.spawn(train_dit, (args,), nprocs=args.workers)
    else:
        train_dit(0, args)
    pack(args.out)


if __name__ == "__main__":
    main()
