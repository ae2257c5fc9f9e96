import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_cluster.errors import UserError
from align_cluster.prompts.files import JsonlPrompts, TextPrompts, parse, quoted


def text_prompts(tmp_path, content, **settings):
    path = tmp_path / "prompts.txt"
    path.write_text(content, encoding="utf-8")
    return TextPrompts(TextPrompts.Config(path=str(path), **settings)).load()


def json_prompts(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return JsonlPrompts(JsonlPrompts.Config(path=str(path))).load()


def test_one_prompt_a_line_and_blank_lines_are_skipped(tmp_path):
    prompts = text_prompts(tmp_path, "\ufeffa cat\n\n  a dog  \n\n")
    assert [(prompt.id, prompt.text) for prompt in prompts] == [(0, "a cat"), (1, "a dog")]
    assert prompts[0].task == "all" and prompts[0].metadata == {}


def test_only_newlines_divide_prompts(tmp_path):
    texts = ["a\u2028b", "c\u2029d\x85e", "f\vg\fh"]
    assert [prompt.text for prompt in text_prompts(tmp_path, "\r\n".join(texts))] == texts
    records = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    assert [prompt.text for prompt in json_prompts(tmp_path, *records)] == texts


def test_a_prompt_with_a_nul_is_refused_with_its_line(tmp_path):
    with pytest.raises(UserError, match="line 2: this prompt holds a NUL"):
        text_prompts(tmp_path, "a cat\na \0dog\n")


PIECES = st.sampled_from(
    [
        *'{}[]":,\\\n\r \0',
        "\u2028",
        "\x85",
        "prompt",
        "include",
        "class",
        "count",
        "-1",
        "1e999",
        "NaN",
        "\\ud800",
        "position",
        "ocr",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.lists(PIECES | st.text(max_size=5), max_size=40).map("".join)))
def test_whatever_a_prompt_file_holds_is_prompts_or_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for kind in (TextPrompts, JsonlPrompts):
        try:
            prompts = kind(kind.Config(path=str(path))).load()
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert prompts and all(prompt.text.strip() and "\0" not in prompt.text for prompt in prompts)


def test_ocr_lines_carry_their_quoted_text(tmp_path):
    prompts = text_prompts(tmp_path, 'a sign "GO"\na poster “Two Words” and "more"\n', ocr=True)
    assert [prompt.metadata["text"] for prompt in prompts] == ["GO", "Two Words"]
    assert {prompt.task for prompt in prompts} == {"ocr"}


def test_an_ocr_line_without_quotes_is_refused_with_its_number(tmp_path):
    with pytest.raises(UserError, match="line 3: .*double quotes"):
        text_prompts(tmp_path, 'a sign "GO"\n\na sign\n', ocr=True)


@pytest.mark.parametrize(
    ("prompt", "text"), [('say "hi" "you"', "hi"), ("nothing", ""), ('an "open end', ""), ('say ""', ""), ("it's", "")]
)
def test_quoted_takes_the_first_pair_of_double_quotes(prompt, text):
    assert quoted(prompt) == text


def test_missing_empty_and_binary_files_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        TextPrompts(TextPrompts.Config(path=str(tmp_path / "no.txt"))).load()
    with pytest.raises(UserError, match="has no prompts"):
        text_prompts(tmp_path, "\n \n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="UTF-8"):
        TextPrompts(TextPrompts.Config(path=str(binary))).load()


def test_geneval_metadata_comes_through_unchanged(tmp_path):
    record = {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a cat",
        "source": "mine",
    }
    (prompt,) = json_prompts(tmp_path, json.dumps(record))
    assert prompt.text == record["prompt"] and prompt.task == "position"
    assert prompt.metadata == {**record, "exclude": []}


def test_ocr_records_take_their_target_from_text_or_quotes(tmp_path):
    prompts = json_prompts(
        tmp_path, '{"tag": "ocr", "prompt": "a sign", "text": "GO"}', '{"tag": "ocr", "prompt": "a sign \\"UP\\""}'
    )
    assert [prompt.metadata["text"] for prompt in prompts] == ["GO", "UP"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "prompt: field required"),
        ('{"prompt": ""}', "prompt: this text is blank"),
        ('{"prompt": " \\u2028 "}', "prompt: this text is blank"),
        ('{"prompt": "a\\u0000"}', "prompt: this text holds a NUL"),
        ('{"prompt": "a \\ud800"}', "not JSON .*hex escape"),
        ('{"prompt": "a", "tag": " "}', "tag: this text is blank"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        ('{"prompt": "a", "": 1}', "a key is blank"),
        ('{"prompt": "a", "seed": ' + "7" * 5000 + "}", "not JSON .*out of range"),
        ('{"prompt": ' + "[" * 9000, "not JSON .*nested more than"),
        ('{"prompt": "a", "include": [{"class": "cat", "count": 1000000}]}', "include.0.count: .*less than or equal"),
        ('{"prompt": "a", "exclude": [{"class": "cat", "count": true}]}', "exclude.0.count: .*valid integer"),
        ('{"prompt": 3}', "prompt: .*valid string"),
        ('{"prompt": "a", "include": [{"count": 1}]}', "include.0.class: field required"),
        ('{"prompt": "a", "include": [{"class": "cat", "count": 0}]}', "include.0.count: .*greater than or equal to 1"),
        ('{"prompt": "a", "include": [{"class": "cat", "count": 1.0}]}', "include.0.count: .*valid integer"),
        ('{"prompt": "a", "include": [{"class": "cat", "count": 1, "colour": "red"}]}', "include.0.colour"),
        ('{"prompt": "a", "include": [{"class": "c", "count": 1, "position": ["near", 0]}]}', "include.0.position.0"),
        ('{"prompt": "a", "include": [{"class": "c", "count": 1, "position": ["above", 0]}]}', "another clause"),
        ('{"prompt": "a", "include": [{"class": "c", "count": 1, "position": ["above", 5]}]}', "another clause"),
        ('{"prompt": "a", "include": [{"class": "cat"}]}', "include.0.count: field required"),
        (
            '{"prompt": "a", "include": [{"class": "cat", "count": -1}]}',
            "include.0.count: .*greater than or equal to 1",
        ),
        ('{"prompt": "a", "include": [{"class": "cat", "count": true}]}', "include.0.count: .*valid integer"),
        ('{"prompt": "a", "exclude": [{"class": "cat", "count": "2"}]}', "exclude.0.count: .*valid integer"),
        ('{"prompt": "a", "include": {"class": "cat"}}', "include: .*valid list"),
        ('{"prompt": "a sign", "tag": "ocr"}', "OCR prompt needs"),
    ],
    ids=lambda text: text[:60],
)
def test_a_bad_line_gives_one_sentence_with_file_and_line(line, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        parse(line, "my.jsonl, line 7")
    assert str(caught.value).startswith("my.jsonl, line 7: ") and "\n" not in str(caught.value)
