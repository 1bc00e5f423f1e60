import json
import os
import threading

import pytest

from tvm_attn.errors import CheckpointError, one_line, shorten
from tvm_attn.jsonfile import exists, parse_json, read_bytes, read_json

LIMIT = 1 << 20


def parse(text):
    return parse_json(text, "x.json", CheckpointError)


@pytest.mark.parametrize("value", [{"a": [1, -2.5, None, True, "é 😀 \x00", {}]}, [], 7, "text", None])
@pytest.mark.parametrize("ascii", [True, False])
def test_parses_what_json_writes(tmp_path, value, ascii):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value, ensure_ascii=ascii), encoding="utf-8")
    assert read_json(path, LIMIT, CheckpointError) == value


def test_a_repeated_name_is_taken_where_its_values_agree():
    assert parse('{"a": 1, "a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a": 1, "a": 2}', "'a' has two values, 1 and 2"),
        ("\ufeff{}", "byte order mark"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "'1e999' is too large"),
        ("[" + "9" * 4301 + "]", "a number of 4301 digits"),
        ("[" + "9" * 401 + "]", "a number of 401 digits"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        (r'["\ud83d"]', r"'\\ud83d' is half a surrogate pair"),
        (r'{"\uDE00": 1}', r"'\\ude00' is half a surrogate pair"),
        ('["' + "x" * 100_000 + '\n"]', "Invalid control character"),
        ('{"' + "x" * 100_000 + '": 1, "' + "x" * 100_000 + '": 2}', "has two values"),
    ],
    ids=range(15),
)
def test_refuses_in_one_short_line(text, message):
    with pytest.raises(CheckpointError, match=f"^x.json is not valid JSON: .*{message}") as caught:
        parse(text)
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_whole_surrogate_pairs_are_characters():
    assert parse(r'"\ud83d\ude00 \\ud83d"') == r"😀 \ud83d"


def test_refuses_what_is_not_utf8(tmp_path):
    (tmp_path / "x").write_bytes(b'"\xff"')
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        read_json(tmp_path / "x", LIMIT, CheckpointError)


def test_a_file_of_100_gib_is_refused_unread(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(CheckpointError, match="is larger than 1 MiB"):
        read_json(path, LIMIT, CheckpointError)


def test_limit_is_inclusive(tmp_path):
    (tmp_path / "x").write_bytes(bytes(LIMIT))
    assert len(read_bytes(tmp_path / "x", LIMIT, CheckpointError)) == LIMIT
    with pytest.raises(CheckpointError, match="is larger than"):
        read_bytes(tmp_path / "x", LIMIT - 1, CheckpointError)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_folders_and_devices_are_refused_at_once(tmp_path, make):
    make(tmp_path / "x")
    failures = []

    def read():
        try:
            read_bytes(tmp_path / "x", LIMIT, CheckpointError)
        except CheckpointError as error:
            failures.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert failures == [f"{tmp_path / 'x'} cannot be read: it is not a regular file"]


def test_missing_and_unreadable_paths(tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        read_bytes(tmp_path / "x", LIMIT, CheckpointError)
    for path in [tmp_path / ("x" * 300), tmp_path / "a\0b", tmp_path / "/".join(["folder"] * 1000)]:
        with pytest.raises(CheckpointError, match="cannot be read: ") as caught:
            read_bytes(path, LIMIT, CheckpointError)
        assert len(str(caught.value)) < 300 and str(caught.value).isprintable()
        with pytest.raises(CheckpointError, match="cannot be read: "):
            exists(path, CheckpointError)
    assert exists(tmp_path, CheckpointError) and not exists(tmp_path / "x" / "y", CheckpointError)


@pytest.mark.parametrize("value", ["x" * 10**6, "\n" * 100, 10**5000, [["x" * 100]] * 100, b"\0" * 10**6], ids=range(5))
def test_shorten_is_short(value):
    assert len(shorten(value)) <= 40 and shorten(value).isprintable()


def test_one_line():
    assert one_line(ValueError(" first\nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 10**6))) == 200
    assert one_line(ValueError("\x1b[2J é")) == r"\x1b[2J é"
