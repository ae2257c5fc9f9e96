"""Pretrain the embedded pipeline: `python -m align_cluster.pretraining.pretrain --out DIR`.

Four stages, each resumable (finished stages are skipped, the last one continues from its newest state):

    clip   CLIPModel on rendered images and captions: the reward model, and the frozen CLIP-L slot
    vae    AutoencoderKL, factor 4, 8 channels
    dit    SD3Transformer2DModel and, jointly, the text encoder of the CLIP-G slot, by flow matching
    pack   everything in fp16 as a StableDiffusion3Pipeline folder, at most 10 MB

`--init DIR` starts the vae and dit stages from another packed folder. align_cluster/embedded/README.md has the recipe,
the time and the result of the shipped weights.
"""

import argparse
import os
import random
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTextModelWithProjection

from align_cluster.embedded import scene
from align_cluster.embedded.render import SIZE, render
from align_cluster.pretraining.networks import (
    CLIP_TEXT,
    LATENT_CHANNELS,
    all_prompts,
    cosine,
    new_clip,
    new_tokenizer,
    new_vae,
    save,
    text_config,
    tokenize,
)
from align_cluster.pretraining.train_dit import DitTrainer

TASK_WEIGHTS = (0.17, 0.19, 0.14, 0.15, 0.14, 0.16, 0.05)


def draw_records(count: int, rng: random.Random) -> list[dict]:
    """Draw `count` training records: the task by TASK_WEIGHTS, then a prompt of the task."""
    tasks = rng.choices(scene.TASKS, TASK_WEIGHTS, k=count)
    return [rng.choice(scene.prompts(task, "train")) for task in tasks]


def data_set(out: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (images uint8 [N, 3, 48, 48], index of each image's prompt in `all_prompts()`).

    They are rendered once and cached in `out`.
    """
    path = out / f"images_{count}.pt"
    if not path.exists():
        index = {prompt: i for i, prompt in enumerate(all_prompts())}
        rng, images, owners = random.Random(0), [], []
        for start in range(0, count, 1024):
            records = draw_records(min(1024, count - start), rng)
            images.append(render(records, seed=start))
            owners += [index[record["prompt"]] for record in records]
        save((torch.cat(images), torch.tensor(owners)), path)
    return torch.load(path, weights_only=True)


def train_clip(out: Path, images: torch.Tensor, owners: torch.Tensor, steps: int, batch: int = 192) -> None:
    """Train the CLIP by contrast on images and captions, and save it to OUT/clip."""
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
    """Return L2-normalised (image, text) features, each [B, projection]; images are uint8."""
    seen = model.get_image_features(pixel_values=images.float() / 127.5 - 1)
    read = model.get_text_features(input_ids=ids)
    seen, read = (getattr(feature, "pooler_output", feature).float() for feature in (seen, read))
    return F.normalize(seen, dim=-1), F.normalize(read, dim=-1)


def train_vae(out: Path, vae: AutoencoderKL, images: torch.Tensor, steps: int, batch: int = 32) -> None:
    """Train the VAE on absolute, squared and edge errors with a small KL, and save it to OUT/vae."""
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
    """Return images uint8 as floats in [-1, 1], in the memory layout of the VAE."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_latents(out: Path, images: torch.Tensor) -> torch.Tensor:
    """Return normalised posterior means of the images, fp16 [N, 8, 12, 12]; they are cached in `out`."""
    path = out / f"latents_{len(images)}.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(out / "vae").to(memory_format=torch.channels_last)
        shift, scale, parts = vae.config.shift_factor, vae.config.scaling_factor, []
        for part in images.split(256):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mean = vae.encode(pixels(part)).latent_dist.mean.float()
            parts.append(((mean - shift) * scale).half())
        save(torch.cat(parts), path)
    return torch.load(path, weights_only=True)


def train_dit(rank: int, args: argparse.Namespace) -> None:
    """Run one data-parallel process of the dit stage."""
    if args.workers > 1:
        torch.set_num_threads(1)
        store = f"file://{(args.out / f'rendezvous_{os.getppid()}').resolve()}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.workers)
    images, owners = data_set(args.out, args.images)
    DitTrainer(args, rank).run(encode_latents(args.out, images), owners)


def pack(out: Path) -> Path:
    """Write OUT/pipeline (a StableDiffusion3Pipeline folder) and OUT/pipeline/clip in fp16; return the folder.

    Raises RuntimeError if the result exceeds the 10 MB that may ship.
    """
    target = out / "pipeline"
    shutil.rmtree(target, ignore_errors=True)
    clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32)
    frozen = CLIPTextModelWithProjection(text_config(*CLIP_TEXT, vocab=len(new_tokenizer())))
    source, state = clip.state_dict(), frozen.state_dict()
    for name in state:
        state[name] = source[name if name in source else f"text_model.{name}"]
    frozen.load_state_dict(state)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(out / "transformer").half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(out / "vae").half(),
        text_encoder=frozen.half(),
        tokenizer=new_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(out / "guide").half(),
        tokenizer_2=new_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(target)
    clip.half().save_pretrained(target / "clip")
    new_tokenizer().save_pretrained(target / "clip")
    square = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPImageProcessorPil(**square, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(target / "clip")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"packed {target}: {size / 1e6:.2f} MB")
    if size > 10_000_000:
        raise RuntimeError(f"the packed pipeline has {size} bytes, more than the 10 MB that may ship")
    return target


def main() -> None:
    """Run the command line."""
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
