"""Makes a wheel of this package from the files that are imported here, for clusters that have only its dependencies."""

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import align_cluster
from align_cluster.embedded import pipeline_path

PACKAGE = Path(align_cluster.__file__).parent
ABOUT = f"align_cluster-{align_cluster.__version__}.dist-info"


def build(folder: Path, model: bool) -> Path:
    """Write the wheel into `folder` and return its path; `model` says whether the embedded model's 9 MB go along.

    It names no dependencies: pip would install those beside the ones that the cluster has. The same files make the same
    wheel, so a cluster keeps it from one job to the next.
    """
    wheel, records = folder / f"align_cluster-{align_cluster.__version__}-py3-none-any.whl", []
    with ZipFile(wheel, "w", ZIP_DEFLATED) as target:

        def add(name: str, content: bytes) -> None:
            target.writestr(ZipInfo(name), content, ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            records.append(f"{name},sha256={digest},{len(content)}")

        for file in sorted(_files(model)):
            add(f"align_cluster/{file.relative_to(PACKAGE)}", file.read_bytes())
        about = f"Metadata-Version: 2.1\nName: align-cluster\nVersion: {align_cluster.__version__}\n"
        add(f"{ABOUT}/METADATA", about.encode())
        kind = "Wheel-Version: 1.0\nGenerator: align_cluster\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        add(f"{ABOUT}/WHEEL", kind.encode())
        records.append(f"{ABOUT}/RECORD,,")
        target.writestr(ZipInfo(f"{ABOUT}/RECORD"), "\n".join(records) + "\n", ZIP_DEFLATED)
    return wheel


def _files(model: bool) -> Iterator[Path]:
    """Yield the files of the package; its run files stand behind a link."""
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        if not model and Path(folder) == pipeline_path().parent:
            folders.remove(pipeline_path().name)
        yield from (Path(folder) / name for name in names)
