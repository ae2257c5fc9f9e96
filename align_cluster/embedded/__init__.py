"""The embedded default: a tiny real SD3 pipeline that ships in the package, its renderer and its detector."""

from pathlib import Path

# What its prompts may ask for, as the end of a sentence; `scene.py` has it in full.
WORLD = "circles, squares, triangles, stars, crosses and rings in eight colours, at most four, and words on a sign"


def pipeline_path() -> Path:
    """Return the folder of the shipped StableDiffusion3Pipeline. Its reward CLIP is in the subfolder `clip`."""
    return Path(__file__).parent / "pipeline"
