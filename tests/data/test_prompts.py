"""Prompts from files, and the prompts that are refused."""

import hashlib
import json
import re
import tracemalloc

import pytest

from rectified_diffusers.data.prompts import check_prompts, open_prompts, prompts_sha256, read_prompts

MANY = [f"number {i}, café" if i % 7 else "" for i in range(3000)]  # three blocks


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
        ("p.csv", b"a", "read from .txt, .jsonl and .parquet files"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"a\ncaf\xe9", "line 2: not UTF-8"),
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
    with pytest.raises(TypeError, match="must be a list of texts, got 3; read a file with read_prompts"):
        check_prompts(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="NoneType None at index 1"):
        check_prompts(["a", None])  # pyright: ignore[reportArgumentType]


@pytest.fixture
def write(tmp_path):
    """Write prompts in one of the formats and return the path to open."""

    def write_as(kind, prompts=MANY, column="prompt"):
        path = tmp_path / f"prompts.{kind}"
        if kind == "jsonl":
            path.write_text("\n\n".join(json.dumps({column: prompt}) for prompt in prompts), encoding="utf-8")
        elif kind == "txt":
            path.write_text("\r\n \n".join(prompts), encoding="utf-8")
        elif kind in ("parquet", "folder"):
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow.parquet import write_table

            path.mkdir() if kind == "folder" else None
            halves = (prompts[:1700], prompts[1700:]) if kind == "folder" else (prompts,)
            for i, part in enumerate(halves):
                file = path / f"part-{i}.parquet" if kind == "folder" else path
                write_table(pyarrow.table({column: part, "id": range(len(part))}), file, row_group_size=1100)
        else:
            datasets = pytest.importorskip("datasets")
            dataset = datasets.Dataset.from_dict({column: prompts, "id": range(len(prompts))})
            (datasets.DatasetDict({"train": dataset}) if kind == "splits" else dataset).save_to_disk(path)
        return path

    return write_as


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "dataset", "splits"])
def test_every_form_gives_the_same_prompts(write, kind):
    prompts = open_prompts(write(kind, column="text"), column="text")
    assert len(prompts) == 3000
    places = (0, 2999, 1023, 1024, 1700, -1, -3000)
    assert [prompts[i] for i in places] == [MANY[i] for i in places]
    assert prompts[1500:2500:3] == MANY[1500:2500:3]
    assert list(prompts) == MANY
    assert prompts.sha256 == prompts_sha256(prompts) == prompts_sha256(MANY)
    assert check_prompts(prompts) is prompts
    for index in (3000, -3001):
        with pytest.raises(IndexError, match=f"from 0 to 2999, got {index}"):
            prompts[index]


def test_text_is_read_by_place(write):
    some = [prompt for prompt in MANY if prompt]
    prompts = open_prompts(write("txt", some))
    assert [prompts[i] for i in range(len(some) - 1, -1, -100)] == some[::-100]
    assert prompts.sha256 == prompts_sha256(some)


def test_the_checksum_is_what_manifests_have_always_had():
    expected = hashlib.sha256(b'"a"\n"caf\\u00e9"\n').hexdigest()
    assert prompts_sha256(["a", "café"]) == expected


def test_memory_does_not_grow_with_the_prompts(write):
    peaks = []
    for count in (2_000, 40_000):
        path = write("txt", [f"a photo of {i} in the kitchen, by the window" for i in range(count)])
        tracemalloc.start()
        prompts = open_prompts(path)
        assert prompts[count - 1].startswith(f"a photo of {count - 1}")
        assert prompts[0].startswith("a photo of 0")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_file_that_changes_while_it_is_used_raises(write):
    path = write("jsonl")
    prompts = open_prompts(path)
    assert prompts[0] == MANY[0]
    path.write_text('{"prompt": "another"}\n')
    with pytest.raises(ValueError, match="was changed after it was opened"):
        prompts[2000]


def test_columns_splits_and_rows_that_are_not_there_raise(write, tmp_path):
    for kind in ("parquet", "dataset"):
        with pytest.raises(ValueError, match=r"has no column 'caption'; name the one with the prompts: prompt, id"):
            open_prompts(write(kind), column="caption")
    with pytest.raises(ValueError, match="has no split 'test'; choose one of 'train'"):
        open_prompts(write("splits"), split="test")
    with pytest.raises(ValueError, match="row 1 of row group 0: expected a text, got None; leave such rows out"):
        open_prompts(write("parquet", ["a", None]))
    with pytest.raises(ValueError, match=r"row 1500: expected a text, got None"):
        open_prompts(write("dataset", [None if i == 1500 else prompt for i, prompt in enumerate(MANY)]))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'prompts.parquet'))} holds no prompt"):
        open_prompts(write("parquet", []))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'prompts.folder/part-0.parquet'))} holds no"):
        open_prompts(write("folder", []))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not a complete parquet file"):
        open_prompts(tmp_path / "torn.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \*\.parquet file"):
        open_prompts(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        open_prompts(tmp_path / "none.parquet")


def test_a_row_group_is_read_once_for_all_the_blocks_in_it(write, monkeypatch):
    """Groups can be a million rows; here, blocks of 1024 prompts lie in groups of 1100."""
    parquet = pytest.importorskip("pyarrow.parquet")
    prompts, read, original = open_prompts(write("parquet")), [], parquet.ParquetFile.read_row_group

    def read_row_group(file, number, *args):
        read.append(number)
        return original(file, number, *args)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", read_row_group)
    assert list(prompts) == MANY
    assert read == [0, 1, 2]


def test_a_table_that_changes_while_it_is_used_is_told_by_its_row(write):
    prompts = open_prompts(write("parquet"))
    write("parquet", [None if i == 1050 else prompt for i, prompt in enumerate(MANY)])
    with pytest.raises(ValueError, match="row 1050 of row group 0: expected a text, got None"):
        prompts[1030]


def test_a_path_into_a_folder_is_no_name_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    with pytest.raises(ValueError, match=r"\(owner/name\), got work/prompts; rename or convert it"):
        open_prompts("work/prompts")


def test_data_sets_of_the_hub_go_by_their_id(monkeypatch, write):
    datasets = pytest.importorskip("datasets")
    path, asked = write("dataset"), []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.load_from_disk(path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_prompts("owner/prompts", split="train[:10%]")) == MANY
    assert asked == [("owner/prompts", "train[:10%]")]


@pytest.mark.parametrize(("name", "package"), [("p.parquet", "pyarrow"), ("owner/prompts", "datasets")])
def test_a_missing_package_is_named(monkeypatch, tmp_path, name, package):
    import builtins

    original = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return original(module, *args, **kwargs)

    (tmp_path / "p.parquet").touch()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=rf"need the package {package}: pip install \"rectified_diffusers\[datasets\]"
    ):
        open_prompts(tmp_path / name if name == "p.parquet" else name)
