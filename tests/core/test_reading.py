"""Files that nobody vouches for: read strictly, in bounded time and memory."""

import json
import os

import pytest

from mlx_kvret.core.plain import plain, spoken
from mlx_kvret.core.reading import exactly, parse_json, read_bytes, read_json_value
from mlx_kvret.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "line 1"),
        ('{"a": 1,\n"a": 2}', "'a' stands more than once"),
        ('[{"a": {"b": 1, "b": 1}}]', "'b' stands more than once"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "beyond the range of numbers"),
        ("9" * 400, "of 400 digits is beyond"),
        ("9" * 5000, "of 5000 digits is beyond"),
        (str(2**63), "beyond the range of 64 bits"),
        (r'"\ud800"', "half a character"),
        (r'{"\udfff": 1}', "half a character"),
        ("[" * 65 + "]" * 65, "more than 64 levels deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels deep"),
        ("[" * 100_000, "more than 64 levels deep"),
        (b"\xff\xfe", "can't decode"),
    ],
)
def test_json_that_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize(
    "value",
    [None, True, -(2**63 - 1), 1.5e308, "é\U0001f600\n", [], {}, [[[1]]], {"a": {"b": [1, 2.0, "c"]}}],
)
def test_json_that_is_read(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode("utf-8-sig")):
        found = parse_json(text)
        assert found == value and exactly(found, value)


def test_infinity_is_read_where_others_write_it():
    assert parse_json('{"a": [0.0, Infinity]}', infinity=True) == {"a": [0.0, float("inf")]}
    for text in ("9" * 400, '{"a": 1, "a": 2}', "[" * 65 + "]" * 65):
        with pytest.raises(ValueError, match=r"digits|once|deep"):
            parse_json(text, infinity=True)


@pytest.mark.parametrize(
    ("found", "expected"), [(True, 1), (1.0, 1), ("1", 1), ({"a": 1.0}, {"a": 1}), (None, 0)]
)
def test_numbers_of_another_kind_are_other_values(found, expected):
    assert not exactly(found, expected) and exactly(expected, expected)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            read_bytes(path)
    (tmp_path / "a.json").write_text("[1,\n2")
    with pytest.raises(CheckpointError, match=r"a\.json is not valid JSON .*line 2"):
        read_json_value(tmp_path / "a.json")


def test_what_errors_quote_does_nothing_to_a_terminal():
    hostile = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202eback\ud800\r"
    for text in (plain(hostile), str(ConfigError(f"found {hostile!s}"))):
        assert not set(text) & set("\x1b\x07\x9b\u202e\ud800\r")
        assert r"\x1b[31mred" in text
    assert plain("naïve β … 日本\tx\ny") == "naïve β … 日本\tx\ny"
    assert len(str(ConfigError("x" * 10**6))) < 5000
    assert "\x1b" not in spoken(hostile) and "\ud800" not in spoken(hostile)
