"""Prompts from files, and the prompts that are refused."""

import pytest

from rectified_diffusers.data.prompts import check_prompts, read_prompts


def test_text_files_have_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red apple\r\n\n  café \u2028 noir\n".encode())
    assert read_prompts(path) == ["a red apple", "café \u2028 noir"]


def test_json_lines_have_a_prompt_each_and_it_may_be_empty(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a red apple", "id": 3}\n{"prompt": ""}\n')
    assert read_prompts(str(path)) == ["a red apple", ""]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.csv", b"a", "read from .txt or .jsonl files"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"caf\xe9", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        ("p.jsonl", b'\n{"text": "a"}', "line 2: expected an object like"),
        ("p.jsonl", b'["a"]', "line 1: expected an object like"),
        ("p.jsonl", b'{"prompt": 3}', "line 1: expected an object like"),
    ],
)
def test_wrong_files_raise(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_prompts(tmp_path / name)


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_prompts(tmp_path / "none.txt")


def test_check_prompts():
    assert check_prompts(("", "a")) == ["", "a"]
    with pytest.raises(TypeError, match=r"pass \['a red apple'\]"):
        check_prompts("a red apple")
    with pytest.raises(ValueError, match="at least one prompt"):
        check_prompts([])
    with pytest.raises(TypeError, match="NoneType None at index 1"):
        check_prompts(["a", None])  # pyright: ignore[reportArgumentType]
