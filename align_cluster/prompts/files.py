"""Prompts from files: one prompt a line (txt), or one JSON object a line with GenEval or OCR metadata (jsonl)."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from align_cluster.errors import UserError
from align_cluster.plain import json_value
from align_cluster.prompts.base import PromptSource
from align_cluster.settings import Section
from align_cluster.texts import fault, lines, read_text
from align_cluster.types import Prompt

RELATIONS = ("left of", "right of", "above", "below")
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def _words(text: str) -> str:
    if problem := fault(text):
        raise PydanticCustomError("words", "This text {problem}", {"problem": problem})
    return text


Words = Annotated[str, AfterValidator(_words)]  # text that says something, and that files and encoders can hold
Count = Annotated[StrictInt, Field(ge=1, le=10_000)]  # objects of one class; no detector finds more


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
            if problem := fault(line):
                raise UserError(f"{self.config.path}, line {number}: this prompt {problem}; delete it there")
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

    name: Annotated[Words, Field(alias="class")]
    """The class of the objects, by the name that the detector has for it. The key in the file is `class`."""
    count: Count
    """The number of objects that the image must show."""
    color: Words | None = None
    """The colour that each of them must have. null leaves it open."""
    position: tuple[Literal[RELATIONS], Annotated[StrictInt, Field(ge=0)]] | None = None
    """Where the objects must be: a relation, and the index of the other clause of `include` that it refers to. null
    leaves it open."""


class Exclude(Section):
    """The image must show fewer than `count` objects of this class."""

    name: Annotated[Words, Field(alias="class")]
    """The class of the objects. The key in the file is `class`."""
    count: Count
    """The number of objects that is already too many."""


CLAUSES = {"include": Include, "exclude": Exclude}


class Record(BaseModel):
    """Holds what rewards read of a prompt's metadata: GenEval's fields, or the text of an OCR prompt. Other keys are
    kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    tag: Words = "all"
    include: list[Include] = []
    exclude: list[Exclude] = []
    text: Words | None = None

    @model_validator(mode="after")
    def positions_name_other_clauses(self) -> "Record":
        """Refuse a position beside no clause, or beside its own."""
        for index, clause in enumerate(self.include):
            target = clause.position[1] if clause.position else None
            if target is not None and (target >= len(self.include) or target == index):
                spot = f"include.{index}.position"
                raise ValueError(f"{spot} names clause {target}; it must be another clause of the list")
        return self


class Line(Record):
    """Holds one line of GenEval's evaluation_metadata.jsonl, or of an OCR file."""

    prompt: Words


Checked = TypeVar("Checked", bound=Record)


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
        raw = json_value(line)
    except ValueError as error:
        raise UserError(f"{where}: this is not JSON ({error}); write one object a line") from None
    if not isinstance(raw, dict):
        raise UserError(f'{where}: a line must be a JSON object such as {{"prompt": "..."}}, not {type(raw).__name__}')
    try:
        checked = check_record(raw, Line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if checked.tag == "ocr" and not checked.text:
        raw["text"] = quoted(checked.prompt)
        if not raw["text"]:
            raise UserError(f'{where}: an OCR prompt needs "text", or its text in double quotes inside the prompt')
    return {"include": [], "exclude": [], **raw}


def check_record(metadata: Any, kind: type[Checked] = Record) -> Checked:
    """Return a prompt's metadata as a record. ValueError names the field that is wrong, and says how."""
    try:
        return kind.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        spot, text = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        found = f": {text[0].lower()}{text[1:]}, got {repr(first['input'])[:200]}" if spot else text
        raise ValueError(spot + found) from None


def quoted(prompt: str) -> str:
    """Return the text inside the first pair of double quotes, or "" if there is none."""
    match = _QUOTED.search(prompt)
    return (match[1] or match[2] or "").strip() if match else ""


def read_lines(path: str) -> list[tuple[int, str]]:
    """Return the non-blank lines of a prompt file with their numbers, counted from 1.

    Raises UserError if the file is missing, empty or not UTF-8.
    """
    found = lines(read_text(path, "prompt file"))
    if not found:
        raise UserError(f"prompt file {path} has no prompts; write one a line")
    return found
