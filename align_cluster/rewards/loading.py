"""Loading published models: a missing, broken or wrong file becomes one sentence that says what to do."""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from align_cluster.errors import UserError, hub_refusal
from align_cluster.rewards.base import ModelSize
from align_cluster.settings import ModelSource

# torch, transformers and open_clip raise these for files that are missing, truncated or of another model.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)

MODEL = ("config.json",)  # what a folder of transformers' has, whatever the model
OPEN_CLIP = ModelSource("a folder with open_clip_config.json and its weights, or a hub id", ("open_clip_config.json",))


@contextmanager
def extra(who: str) -> Iterator[None]:
    """Turn an ImportError into a UserError: `who` needs a package of the extra `rewards`."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"rewards: {who} needs a package that is not installed ({_line(error)}): "
            "pip install 'align-cluster[rewards]'"
        ) from error


@contextmanager
def loading(who: str, what: str, remedy: str) -> Iterator[None]:
    """Turn errors of the UNREADABLE kinds into a UserError: `who` cannot load `what`, and `remedy` says what to do."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(
            f"rewards: {who} cannot load {what}: {remedy} "
            f"({hub_refusal(error) or f'{type(error).__name__}: {_line(error)}'})"
        ) from error


def open_clip_model(who: str, setting: str, source: str, tag: str | None = None) -> tuple[nn.Module, Any, Any]:
    """Return open_clip's model, image transform and tokenizer.

    `source` is a hub id or a folder in open_clip's format; with a `tag` it is one of open_clip's architectures, and the
    tag names its weights. A UserError names the `setting` that `source` comes from.
    """
    with extra(who):
        import open_clip
    name = source
    if tag is None:
        folder = Path(source).expanduser()
        name = f"local-dir:{folder}" if folder.is_dir() else f"hf-hub:{source}"
    remedy = (
        "give a hub id that this machine can reach, or a folder with open_clip_config.json and its weights "
        f"(open_clip_pytorch_model.bin or open_clip_model.safetensors), as {setting}"
    )
    with loading(who, f"{source!r} of {tag!r}" if tag else repr(source), remedy):
        model, transform = open_clip.create_model_from_pretrained(name, tag)
        return model, transform, open_clip.get_tokenizer(name)


def file_of(source: str, name: str) -> Path:
    """Return the path of the file `name` in a folder, or in a hub repository, which is downloaded if necessary."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, name))


def model_size(source: str, published: Mapping[str, ModelSize]) -> ModelSize | None:
    """Return the size of a `published` hub id, or of the weight files in a folder, taken as fp32.

    None where `source` is neither. Nothing is downloaded.
    """
    if source in published:
        return published[source]
    folder = Path(source).expanduser()
    files = [path for end in ("safetensors", "bin", "pt", "pth") for path in folder.glob(f"*.{end}")]
    return ModelSize(sum(path.stat().st_size for path in files) / 4) if files else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
