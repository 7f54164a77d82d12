"""`rectified-diffusers verify`, and the forms of prompts that `triplets` takes."""

from pathlib import Path

import pytest

from rectified_diffusers import cli
from tests.data.test_triplets import generate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generate(tmp_path)
    return tmp_path


def test_verify_says_that_all_is_sound_or_what_is_not(folder, capsys):
    assert cli.main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 10 triplets, all intact\n"
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cli.main(["verify", str(folder)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 3 shards" in last
    assert f"{path} fails its checksum" in last
    assert cli.main(["verify", str(folder / "none")]) == 2
    assert "give a folder that generate_triplets has written" in capsys.readouterr().err


def test_mistakes_in_the_prompts_are_found_before_the_teacher_is_loaded(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"caption": "a red apple"}\n')
    command = ["triplets", "--teacher", "no/teacher", "--num-triplets", "4", "--output-dir", str(tmp_path / "out")]
    assert cli.main([*command, "--prompts", str(path)]) == 2
    assert 'line 1: expected an object like {"prompt": "..."}' in capsys.readouterr().err
    assert cli.main([*command, "--prompts", str(path), "--prompt-column", "caption"]) == 2
    assert "no/teacher" in capsys.readouterr().err
    assert cli.main([*command, "--prompts", str(path), "--solver", "DDPMScheduler"]) == 2
    assert "invalid choice: 'DDPMScheduler'" in capsys.readouterr().err
