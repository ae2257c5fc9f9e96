"""Prompts from files: one prompt a line (txt), or one JSON object a line with GenEval or OCR metadata (jsonl)."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StrictInt, ValidationError

from align_cluster.errors import UserError
from align_cluster.prompts.base import PromptSource
from align_cluster.settings import Section
from align_cluster.types import Prompt

RELATIONS = ("left of", "right of", "above", "below")
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class TextPrompts(PromptSource):
    """Reads prompts from a text file, one a line. Blank lines are skipped."""

    class Config(Section):
        """Configures a text file with one prompt a line."""

        kind: Literal["txt"] = "txt"
        path: Annotated[str, Field(min_length=1)]
        """The text file, in UTF-8 with one prompt a line. A relative path starts where the command runs."""
        ocr: bool = False
        """Whether the first text in double quotes of each line is the target of the reward ocr. Every line must then
        quote a text."""

    def load(self) -> list[Prompt]:
        """Read the prompts. Raises UserError if the file cannot be read, or an OCR prompt quotes nothing."""
        prompts = []
        for number, line in read_lines(self.config.path):
            metadata: dict[str, Any] = {}
            if self.config.ocr:
                target = quoted(line)
                if not target:
                    raise UserError(
                        f"{self.config.path}, line {number}: an OCR prompt needs its text in double quotes, "
                        'as in: a sign that says "OPEN"'
                    )
                metadata = {"tag": "ocr", "text": target}
            prompts.append(Prompt(len(prompts), line, metadata))
        return prompts


class Include(Section):
    """The image must show `count` objects of this class."""

    name: Annotated[str, Field(alias="class", min_length=1)]
    """The class of the objects, by the name that the detector has for it. The key in the file is `class`."""
    count: Annotated[StrictInt, Field(ge=1)]
    """The number of objects that the image must show."""
    color: str | None = None
    """The colour that each of them must have. null leaves it open."""
    position: tuple[Literal[RELATIONS], Annotated[StrictInt, Field(ge=0)]] | None = None
    """Where the objects must be: a relation, and the index of the other clause of `include` that it refers to. null
    leaves it open."""


class Exclude(Section):
    """The image must show fewer than `count` objects of this class."""

    name: Annotated[str, Field(alias="class", min_length=1)]
    """The class of the objects. The key in the file is `class`."""
    count: PositiveInt
    """The number of objects that is already too many."""


class Line(BaseModel):
    """Holds one line of GenEval's evaluation_metadata.jsonl, or of an OCR file (`text`). Other keys are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    prompt: Annotated[str, Field(min_length=1)]
    tag: Annotated[str, Field(min_length=1)] = "all"
    include: list[Include] = []
    exclude: list[Exclude] = []
    text: Annotated[str, Field(min_length=1)] | None = None


class JsonlPrompts(PromptSource):
    """Reads prompts from a file with one JSON object a line: `prompt`, and what rewards read.

    Rewards read `tag`, `include`, `exclude` and `text`; all other keys are kept.
    """

    class Config(Section):
        """Names the JSON lines file."""

        kind: Literal["jsonl"] = "jsonl"
        path: Annotated[str, Field(min_length=1)]
        """The file, in UTF-8 with one JSON object a line, such as GenEval's evaluation_metadata.jsonl. A relative path
        starts where the command runs."""

    has_records = True

    def load(self) -> list[Prompt]:
        """Read the prompts. Raises UserError with the line number if a line is wrong."""
        records = [parse(line, f"{self.config.path}, line {number}") for number, line in read_lines(self.config.path)]
        return [Prompt(index, record["prompt"], record) for index, record in enumerate(records)]


def parse(line: str, where: str) -> dict[str, Any]:
    """Return the checked record of one line, with `include` and `exclude` always present.

    Raises UserError that begins with `where` and says what is wrong.
    """
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: this is not JSON ({error.msg} at column {error.colno}); write one object a line"
        ) from None
    if not isinstance(raw, dict):
        raise UserError(f'{where}: a line must be a JSON object such as {{"prompt": "..."}}, not {type(raw).__name__}')
    try:
        checked = Line.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        spot = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{where}: {spot}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
        ) from None
    for index, clause in enumerate(checked.include):
        target = clause.position[1] if clause.position else None
        if target is not None and (target >= len(checked.include) or target == index):
            raise UserError(
                f"{where}: include.{index}.position names clause {target}; it must be another clause of the list"
            )
    if checked.tag == "ocr" and not checked.text:
        raw["text"] = quoted(checked.prompt)
        if not raw["text"]:
            raise UserError(f'{where}: an OCR prompt needs "text", or its text in double quotes inside the prompt')
    return {"include": [], "exclude": [], **raw}


def quoted(prompt: str) -> str:
    """Return the text inside the first pair of double quotes, or "" if there is none."""
    match = _QUOTED.search(prompt)
    return (match[1] or match[2] or "").strip() if match else ""


def read_lines(path: str) -> list[tuple[int, str]]:
    """Return the non-blank lines with their numbers, counted from 1.

    Raises UserError if the file is missing, empty or not UTF-8.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"prompt file {path} does not exist; give a path relative to {Path.cwd()} or an absolute one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read ({error}); it must be UTF-8 text") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"prompt file {path} has no prompts; write one a line")
    return lines
