import pytest

from align_cluster.errors import UserError
from align_cluster.plain import json_value
from align_cluster.texts import MOST, fault, lines, read_text

# What `str.splitlines` cuts at besides the newline and the carriage return.
NO_ENDS = ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("between", NO_ENDS, ids=[f"U+{ord(end):04X}" for end in NO_ENDS])
def test_only_a_newline_ends_a_line(between):
    assert lines(f"a{between}b\r\nc\n\n d\r\n") == [(1, f"a{between}b"), (2, "c"), (4, "d")]


def test_a_carriage_return_inside_a_line_stays_there():
    assert lines("a\rb\nc") == [(1, "a\rb"), (2, "c")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("folder", "is no file"),
        ("latin-1", "cannot be read .*must be UTF-8"),
        ("large", f"more than {MOST} bytes"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, content, said):
    path = tmp_path / "words.txt"
    if content == "folder":
        path.mkdir()
    elif content == "latin-1":
        path.write_bytes("a café".encode("latin-1"))
    elif content == "large":
        with path.open("wb") as file:
            file.truncate(MOST + 1)
    with pytest.raises(UserError, match=f"the list .*words.txt.* {said}") as caught:
        read_text(path, "the list")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/dev/zero", "a\0b", "~nobody-has-this-name/list.txt", "x" * 300, "/proc/self/mem"])
def test_a_path_that_is_no_file_is_one_sentence(path):
    with pytest.raises(UserError) as caught:
        read_text(path, "the list")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, "nested more than 50 deep"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "nested more than 50 deep"),
        ('{"a": ' + "1" * 5000 + "}", "out of range"),
        ('{"a": 9223372036854775808}', "64 bits"),
        ('{"a": 1e999}', "too large"),
        ('{"a": NaN}', "at column"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"a": [{"b": 1, "b": 1}]}', "'b' is there twice"),
        ('{" ": 1}', "a key is blank"),
        ('{"a": "\\ud800"}', "hex escape"),
        ("{", "at column 1"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_others_read_otherwise_or_not_at_all_is_refused(line, said):
    with pytest.raises(ValueError, match=said):
        json_value(line)


def test_json_keeps_its_values():
    assert json_value('{"a": [1, -2.5, null, true, "\u2028 x"], "b": 9223372036854775807}') == {
        "a": [1, -2.5, None, True, "\u2028 x"],
        "b": 2**63 - 1,
    }


@pytest.mark.parametrize(
    ("text", "said"), [("\u2028 \t", "blank"), ("a\0", "NUL"), ("\udc80", "surrogate"), ("a", None)]
)
def test_a_text_that_can_be_no_prompt_says_why(text, said):
    found = fault(text)
    assert found is None if said is None else said in found
