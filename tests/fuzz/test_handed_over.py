"""Whatever is handed over as a run file, a LoRA or a checkpoint becomes a value or a UserError of whole lines.

The examples are the same in every run. To look for new ones, raise EXAMPLES and set `derandomize` to False.
"""

import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align_cluster.backbones.lora_file import read_lora
from align_cluster.checkpoint.store import MANIFEST, Damaged, Store
from align_cluster.config.load import dump, load, loads
from align_cluster.errors import UserError
from align_cluster.loop.resume import starting_point
from align_cluster.loop.state import State
from align_cluster.observe.rundir import RunDir

EXAMPLES = 100
LONGEST_MS = 10_000  # an example takes milliseconds: only what hangs or grows without bound comes near
TINY = Path(__file__).parents[1] / "system" / "tiny.yaml"

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=LONGEST_MS,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=8,
)
TOKENS = st.sampled_from(
    [
        "[",
        "]",
        "{",
        "}",
        ": ",
        ", ",
        "- ",
        "\n",
        "\n  ",
        "&a ",
        "*a ",
        "<<: ",
        "!!int ",
        "!!float ",
        "!!timestamp ",
        "|",
    ]
    + ["? ", "---\n", "%YAML ", "'", '"', "\\", "~", "0x_", "1:30:00", "2024-13-45", "9" * 5000, "[" * 2000, ".nan"]
    + ["steps", "kind", "true", "..", "\0", "\ud800", "s3://a", "=", "#", "\t", "é", "null", "1e400", "-1", "a" * 300]
)
YAML = st.lists(TOKENS | st.text(max_size=8), max_size=12).map("".join)


def outcome(attempt):
    """The value of an attempt, or None after a UserError of whole lines."""
    try:
        return attempt()
    except UserError as error:
        assert all(line.strip() for line in str(error).split("\n"))
        return None


@fuzz
@given(YAML, st.integers(0, 200), st.integers(0, 30))
def test_any_text_in_a_run_file_is_read_or_named(inserted, line, cut):
    lines = TINY.read_text().splitlines()
    line %= len(lines)
    at = min(cut, len(lines[line]))
    text = "\n".join([*lines[:line], lines[line][:at] + inserted, *lines[line + 1 :]])
    config = outcome(lambda: loads(text))
    if config is not None:
        assert loads(dump(config)) == config


@fuzz
@given(st.lists(YAML, max_size=3), YAML)
def test_any_override_and_any_text_alone_is_read_or_named(overrides, text):
    outcome(lambda: loads(text))
    outcome(lambda: load(TINY, overrides))
    config = outcome(lambda: load(TINY, [f"name={text}"]))
    if config is not None:
        assert ".." not in config.name.split("/") and "/" not in config.name


def safetensors(header: object, body: bytes) -> bytes:
    """A safetensors file of any header and content."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


NAMES = st.sampled_from(
    [f"transformer.x.lora_{half}.weight" for half in "AB"] + ["unet.y.lora_A.weight", "transformer.x.alpha", "a\nb"]
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from("F32 F16 BF16 F64 I8 U8 BOOL F8_E4M3 F8_E5M2 F4 C64 x".split()),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**63]), max_size=3),
        "data_offsets": st.tuples(st.sampled_from([0, 4, 8, 16]), st.sampled_from([4, 8, 16, 32, 2**63])),
    }
)
ABOUT = st.dictionaries(
    st.sampled_from([f"transformer.{name}" for name in "lora_alpha use_rslora alpha_pattern use_dora r".split()]), JSON
)
METADATA = st.fixed_dictionaries({"lora_adapter_metadata": ABOUT.map(json.dumps) | st.text(max_size=30)}) | JSON


@fuzz
@given(st.dictionaries(NAMES, ENTRY | JSON, max_size=3), METADATA, st.binary(max_size=32), st.integers(0, 400))
def test_any_header_of_a_lora_file_is_read_or_refused(entries, metadata, body, cut):
    content = safetensors(entries | {"__metadata__": metadata}, body)
    sound = safetensors(
        {
            "transformer.x.lora_A.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
            "__metadata__": metadata,
        },
        (body + bytes(8))[:8],
    )
    with tempfile.TemporaryDirectory() as folder:
        for data in (content, content[:cut], sound):
            file = Path(folder) / "lora.safetensors"
            file.write_bytes(data)
            lora = outcome(lambda file=file: read_lora(file))
            if lora is not None:
                assert lora.rank > 0 and 0 < lora.alpha < float("inf")
                assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in lora.state.values())


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below `folder` with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


PATHS = st.sampled_from(
    ["../escaped", "../../escaped", "/tmp/escaped", "run.json", "metrics.jsonl", "evaluations.jsonl", "config.yaml"]
    + ["..", ".", "", "a/b", "\0", "lock", "x.jsonl", "../../escaped.jsonl"]
)
CHANGES = st.dictionaries(st.sampled_from(["format", "step", "about", "files", "other"]), JSON, max_size=2)


@settings(fuzz, max_examples=EXAMPLES // 5)  # each writes a checkpoint to the disk
@given(CHANGES, st.dictionaries(PATHS, JSON, max_size=3), JSON, st.booleans())
def test_any_manifest_is_a_checkpoint_or_damaged_and_writes_nothing_outside_of_the_run(changes, files, facts, alone):
    config = load(TINY)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.create(Path(folder) / "runs", "tiny")
        run.config.write_text(dump(config))
        store, content = Store(str(run.checkpoints)), {"run.json": json.dumps(facts).encode()}
        store.write(5, content | {"metrics.jsonl": b"{}\n"}, {})
        path = Path(store.folder(5)) / MANIFEST
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        if alone:
            manifest |= changes
        if isinstance(manifest["files"], dict):
            entry = next(iter(manifest["files"].values()), None)
            manifest["files"] |= {name: entry if isinstance(value, bool) else value for name, value in files.items()}
        signature = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(manifest | {"sha256": signature}))
        before = listing(Path(folder))

        def resume() -> None:
            with starting_point(config, run.path.parent, "auto", lambda note: None, {}):
                pass

        outcome(resume)
        store.prune(1, True)
        changed = listing(Path(folder)).items() ^ before.items()
        allowed = {str(run.path / name) for name in ("metrics.jsonl", "evaluations.jsonl", "lock")}
        assert {name for name, _ in changed} <= allowed
    assert not os.path.exists("/tmp/escaped")


@fuzz
@given(
    st.dictionaries(st.sampled_from(["config", "versions", "learner", "other"]), JSON, max_size=4) | JSON, st.binary()
)
def test_any_content_of_a_checkpoint_is_a_state_or_damaged(facts, tensors):
    for state in (tensors, safetensors({"learner/x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234")):
        files = {"run.json": json.dumps(facts).encode(), "state.safetensors": state, "metrics.jsonl": tensors}
        try:
            State.of(1, files)
        except Damaged as error:
            assert "\n" not in str(error)
