"""Text files that users have: every error names the file, the line and the remedy, before any work begins."""

import json
import os
import subprocess
import sys

import pytest

from rectified_diffusers import cli, read_pictures, read_prompts
from rectified_diffusers.checks import require_unicode
from rectified_diffusers.lines import MAX_LINE_BYTES
from tests.tiny import make_tiny_pipeline

GOOD = b'{"file_name": "a.png", "text": "a red apple", "prompt": "a red apple"}'
BROKEN = {
    "not JSON": (b"{'text': 1}", "line 2: not JSON"),
    "cut off": (GOOD[:20], "line 2: not JSON"),
    "two objects": (GOOD + GOOD, "line 2: not JSON"),
    "a list": (b'["a"]', "line 2: expected an object like"),
    "a number": (b"3", "line 2: expected an object like"),
    "null": (b"null", "line 2: expected an object like"),
    "a missing key": (b'{"other": "a"}', "line 2: expected an object like"),
    "a number for a text": (b'{"file_name": "a.png", "text": 3, "prompt": 3}', "line 2: expected an object like"),
    "Latin-1": (b'{"text": "caf\xe9"}', "line 2: not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "line 2: not UTF-8"),
    "UTF-16 without a byte-order mark": (GOOD.decode().encode("utf-16-le"), "line 2: expected text, got NUL"),
    "UTF-32": (GOOD.decode().encode("utf-32"), "line 2: not UTF-8"),
    "one line of a list": (GOOD + b",", "line 2: not JSON"),
    "a list over several lines": (b"[\n" + GOOD + b"\n]", "line 2: not JSON"),
    "half a surrogate pair": (
        b'{"file_name": "a.png", "text": "\\ud83d", "prompt": "\\ud83d"}',
        r"line 2: expected Unicode text, got half of a surrogate pair: '\\ud83d'. Remove it.",
    ),
    "deep nesting": (b"[" * 200_000, "line 2: not JSON"),
    "a huge number": (b"1" * 10_000, "line 2: not JSON"),
    "a long line": (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', "line 2: expected at most 1048576 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("file", ["metadata.jsonl", "prompts.jsonl"])
def test_broken_lines_are_refused_with_file_and_line(tmp_path, name, file):
    content, text = BROKEN[name]
    path = tmp_path / file
    path.write_bytes(GOOD + b"\n" + content + b"\n" + GOOD + b"\n")
    with pytest.raises(ValueError, match=text) as caught:
        read_pictures(tmp_path, 8) if file == "metadata.jsonl" else read_prompts(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content", ["﻿{}\n", "{}\r\n", "\n\n{}\n\n", "{}"], ids=["BOM", "CRLF", "blank lines", "no end"]
)
def test_harmless_differences_are_accepted(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content.replace("{}", json.dumps({"prompt": "naïve 🍎"})), encoding="utf-8", newline="")
    assert read_prompts(path) == ["naïve 🍎"]


@pytest.mark.parametrize("name", ["../a.png", "/etc/hostname", "b/../../a.png"])
def test_images_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(ValueError, match="expected a file_name in"):
        read_pictures(folder, 8)


def test_replaced_images_of_equal_size_are_other_images(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    identities = []
    for content in (b"1234", b"1235", b"1234"):
        (tmp_path / "a.png").write_bytes(content)
        identities.append(read_pictures(tmp_path, 8).identity)
    assert identities[0] != identities[1]
    assert identities[0] == identities[2]


@pytest.mark.parametrize("value", ["a \ud800", ["a", "b \udfff"], ("\ud83d",)])
def test_half_of_a_surrogate_pair_is_refused(value):
    with pytest.raises(ValueError, match="prompt: expected Unicode text, got half of a surrogate pair"):
        require_unicode("prompt", value)


@pytest.mark.parametrize("value", ["", "🍎", ["a", "é"], None, 3])
def test_other_texts_are_accepted(value):
    require_unicode("prompt", value)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_pipelines_refuse_what_no_tokenizer_reads(name):
    with pytest.raises(ValueError, match=f"{name}: expected Unicode text"):
        make_tiny_pipeline("flow")(**{"prompt": "a", name: "a \udcff"}, guidance_scale=2.0)


def test_arguments_that_are_not_utf_8_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rectified-diffusers", "generate", b"a \xff".decode("utf-8", "surrogateescape")])
    assert cli.main() == 2
    assert r"expected arguments in UTF-8, got b'a \xff'" in capsys.readouterr().err


def test_arguments_of_a_c_locale_are_utf_8():
    argument = "é apple".encode().decode("ascii", "surrogateescape")
    assert cli._decoded([argument, "plain", "🍎"]) == ["é apple", "plain", "🍎"]


@pytest.mark.slow
@pytest.mark.parametrize("forced", [False, True], ids=["C", "ASCII"])
def test_prompts_under_a_c_locale_generate_the_same_image(tmp_path, forced):
    """`forced` switches off what Python does by itself in a C locale."""
    locales = {"utf": {"LC_ALL": "C.UTF-8"}, "c": {"LC_ALL": "C"}}
    if forced:
        locales["c"] |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, variables in locales.items():
        command = [sys.executable, "-m", "rectified_diffusers.cli", "generate", "café 🍎", "--guidance-scale", "2"]
        command += ["--negative-prompt", "naïve", "--device", "cpu", "-o", str(tmp_path / f"{name}.png")]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "utf.png").read_bytes()
