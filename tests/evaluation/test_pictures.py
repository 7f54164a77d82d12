import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rectified_diffusers.data.real_images import choose, read_pictures
from tests.tiny_inputs import CAPTIONS, PER_CAPTION, SIZE


def test_an_imagefolder_is_squared_and_knows_its_captions(data):
    pictures = read_pictures(data, SIZE)
    assert pictures.captions[0] == "a red apple"
    assert set(pictures.splits) == {"train", "caption"}
    assert set(pictures.styles) == {"oil", "pencil"}
    images = pictures.read([3, 0])
    assert images.shape == (2, 3, SIZE, SIZE)
    assert images.dtype == torch.uint8
    whole = np.asarray(Image.open(data / "0-3.png"))  # 8 pixels wider than high: the middle is kept
    assert np.array_equal(images[0].permute(1, 2, 0), whole[:, 4:-4])


def test_what_the_emoji_example_writes_is_read_as_it_is(tmp_path):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    save_file({"images": images}, tmp_path / "images.safetensors")
    rows = [{"label": f"thing {i}", "style": "noto", "split": "train"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = read_pictures(tmp_path, 64)
    assert torch.equal(pictures.read([2, 1]), images[[2, 1]])
    assert pictures.captions[2] == "thing 2"
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"has 4 images, rows\.jsonl 1 lines"):
        read_pictures(tmp_path, 64)


def test_pictures_without_a_split_are_of_the_one_asked_for(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "nothing"}\n')
    assert read_pictures(tmp_path, 8, "seen").numbers("seen") == [0]


def test_the_identity_follows_the_content(data, tmp_path):
    assert read_pictures(data, SIZE).identity == read_pictures(data, SIZE).identity
    assert read_pictures(data, SIZE).identity != read_pictures(data, 2 * SIZE).identity


def test_a_choice_pairs_two_pictures_of_each_caption(data):
    pictures = read_pictures(data, SIZE)
    choice = choose(pictures, "train", 6, seed=0)
    assert choice.paired
    assert [pictures.captions[i] for i in choice.reference] == choice.prompts
    assert [pictures.captions[i] for i in choice.floor] == choice.prompts
    assert len({*choice.reference, *choice.floor}) == 12
    assert set(choice.prompts[:3]) == {caption for caption, split in CAPTIONS.items() if split == "train"}
    assert choice == choose(pictures, "train", 6, seed=0)
    assert choice != choose(pictures, "train", 6, seed=1)
    assert len(choose(pictures, "caption", None, seed=0).prompts) == PER_CAPTION // 2


def test_single_pictures_are_divided(data):
    pictures = read_pictures(data, SIZE)
    single = [f"{caption} {i}" for i, caption in enumerate(pictures.captions)]
    alone = type(pictures)(single, pictures.splits, pictures.styles, "", pictures.read)
    choice = choose(alone, "train", 9, seed=0)
    assert not choice.paired
    assert len({*choice.reference, *choice.floor}) == 18
    assert choice.prompts == [single[i] for i in choice.reference]
    with pytest.raises(ValueError, match=r"need as many other real images.*, to 9 at most"):
        choose(alone, "train", 10, seed=0)
    with pytest.raises(ValueError, match=r"there are 0 in total\. Add images"):
        choose(alone, "nothing", None, seed=0)


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no captioned images"):
        read_pictures(tmp_path, 8)
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n")
    with pytest.raises(ValueError, match="holds no line"):
        read_pictures(tmp_path, 8)
    metadata.write_text('{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match=r'line 1: expected an object like {"file_name": "...", "text": "..."}'):
        read_pictures(tmp_path, 8)
    metadata.write_text('{"file_name": "a.png", "text": "a"}\n')
    with pytest.raises(FileNotFoundError, match="which is not in"):
        read_pictures(tmp_path, 8)
