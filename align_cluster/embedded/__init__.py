"""The embedded default: a tiny real SD3 pipeline that ships in the package, its renderer and its detector."""

from pathlib import Path


def pipeline_path() -> Path:
    """Return the folder of the shipped StableDiffusion3Pipeline. Its reward CLIP is in the subfolder `clip`."""
    return Path(__file__).parent / "pipeline"
