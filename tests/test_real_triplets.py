"""Triplets of real pictures: the noise is where the flow, run backwards, ends; the folder is as any other."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rectified_diffusers import cli
from rectified_diffusers.data import dataset as module
from rectified_diffusers.data import generate_real as real_triplets
from rectified_diffusers.data.config import RealTripletConfig, TripletConfig
from rectified_diffusers.data.dataset import JoinedTriplets, TripletDataset
from rectified_diffusers.data.generate import draw_noise
from rectified_diffusers.data.generate_real import generate_real_triplets
from rectified_diffusers.flow.ode import heun
from rectified_diffusers.models.velocity import PipelineVelocity
from tests.data.test_triplets import contents
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline

CAPTIONS = ("a red apple", "the sea", "a cat", "two dogs", "")
# From so near to the noise an untrained flow, too, leads to white noise.
OPTIONS: dict[str, Any] = {
    "num_triplets": 8,
    "triplets_per_shard": 4,
    "batch_size": 3,
    "num_inference_steps": 2,
    "inversion_time": 0.065,
    "seed": 7,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Return an imagefolder of six pictures, of which one is held out."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    lines = []
    for i in range(6):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        line = {"file_name": f"{i}.png", "text": CAPTIONS[i] if i < 5 else "held out"}
        lines.append(line | {"split": "caption" if i == 5 else "train"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def generate(pictures: Path, folder: Path, teacher: Any = None, **options: Any) -> TripletDataset:
    config = RealTripletConfig(**{**OPTIONS, **options})
    return generate_real_triplets(teacher or make_tiny_pipeline("diffusion"), pictures, folder, config, progress=False)


@pytest.fixture(scope="module")
def reference(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    generate(pictures, folder)
    return folder


def test_the_data_are_the_pictures_and_they_repeat_with_other_noise(reference, pictures):
    rows, teacher = TripletDataset(reference).rows(range(8)), make_tiny_pipeline("diffusion")
    assert sorted(rows.prompts[:5]) == sorted(CAPTIONS)
    assert rows.prompts[5:] == rows.prompts[:3]
    torch.testing.assert_close(rows.data[5:], rows.data[:3], rtol=2**-10, atol=1e-4)  # rounded in other batches
    assert not torch.equal(rows.noise[5:], rows.noise[:3])
    picture = Image.open(pictures / f"{CAPTIONS.index(rows.prompts[0])}.png").crop((4, 0, 36, 32))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = teacher.vae.encode(pixels).latent_dist.mean * teacher.vae.config.scaling_factor
    torch.testing.assert_close(rows.data[:1], expected, rtol=2**-10, atol=2e-4)


@pytest.mark.parametrize("kind", slow_but(["diffusion"], ["diffusion", "flow", "sd3"]))
def test_the_flow_leads_from_the_noise_back_to_where_the_way_began(pictures, tmp_path, kind, monkeypatch):
    """An untrained flow goes astray at once: its noise need not be white here."""
    monkeypatch.setattr(module, "_is_unit_white", lambda noise: True)
    teacher = make_tiny_pipeline(kind)
    options: dict[str, Any] = {"num_triplets": 4, "num_inference_steps": 12, "storage_dtype": "float32"}
    rows = generate(pictures, tmp_path, teacher, inversion_time=0.15, **options).rows(range(4))
    velocity = PipelineVelocity.of(teacher, rows.prompts)
    with torch.no_grad():
        reached = heun(velocity, velocity.state_at_start(rows.noise), 12, velocity.start, 0.15)
    began = 0.15 * rows.data + 0.85 * draw_noise(7, 0, (4, *rows.noise.shape[1:]))
    assert (reached - began).norm() < 0.02 * began.norm()


def test_a_gaussian_keeps_its_place(pictures, tmp_path, monkeypatch):
    """Data of unit variance have the flow x_t = sqrt(t^2 + (1 - t)^2) * noise: of white data the noise is the data."""
    generator = torch.Generator().manual_seed(2)
    white = torch.randn(4, 4, 8, 8, generator=generator)
    monkeypatch.setattr(real_triplets, "encode_pixels", lambda vae, pixels: white[: len(pixels)])
    teacher = make_tiny_pipeline("diffusion")

    def noise_of(sample: torch.Tensor, timestep: torch.Tensor, **rest: Any) -> tuple[torch.Tensor]:
        alpha = teacher.scheduler.alphas_cumprod.sqrt()
        signal = torch.from_numpy(np.interp(timestep.numpy(), np.arange(len(alpha)), alpha.numpy())).float()
        return ((1 - signal.square()).sqrt()[:, None, None, None] * sample,)

    monkeypatch.setattr(teacher.unet, "forward", noise_of)
    options: dict[str, Any] = {
        "num_triplets": 4,
        "batch_size": 4,
        "num_inference_steps": 40,
        "storage_dtype": "float32",
    }
    for begin in (0.9, 0.5):
        rows = generate(pictures, tmp_path / str(begin), teacher, inversion_time=begin, **options).rows(range(4))
        began = begin * white + (1 - begin) * draw_noise(7, 0, white.shape)
        torch.testing.assert_close(rows.noise, began / math.hypot(begin, 1 - begin), atol=0.02, rtol=0.02)


def test_of_no_steps_the_noise_is_new_and_the_flow_is_not_asked(reference, pictures, tmp_path, monkeypatch):
    teacher = make_tiny_pipeline("diffusion")
    monkeypatch.delattr(type(teacher.unet), "forward")
    rows = generate(pictures, tmp_path, teacher, num_inference_steps=0).rows(range(8))
    expected = TripletDataset(reference).rows(range(8))
    assert (rows.prompts, rows.data.tolist()) == (expected.prompts, expected.data.tolist())
    noise = torch.cat([draw_noise(7, shard, (4, *rows.noise.shape[1:])) for shard in range(2)])
    torch.testing.assert_close(rows.noise, noise, rtol=2**-10, atol=1e-6)
    assert json.loads((tmp_path / "manifest.json").read_text())["solver"] == "none, new noise"


def test_a_run_that_was_stopped_goes_on_bit_for_bit(reference, pictures, tmp_path):
    (tmp_path / "manifest.json").write_bytes((reference / "manifest.json").read_bytes())
    (tmp_path / "shard-00001.safetensors").write_bytes((reference / "shard-00001.safetensors").read_bytes())
    generate(pictures, tmp_path)
    assert contents(tmp_path) == contents(reference)


@pytest.mark.parametrize(
    "options", [{"inversion_time": 0.07}, {"split": "caption"}, {"num_inference_steps": 3}], ids=str
)
def test_other_settings_are_another_folder(reference, pictures, tmp_path, options):
    (tmp_path / "manifest.json").write_bytes((reference / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match=f"expected .*{next(iter(options))}|expected num_prompts") as raised:
        generate(pictures, tmp_path, **options)
    assert str(raised.value).endswith("There are no triplets yet: to start again, remove that file.")


def test_a_replaced_picture_of_equal_size_is_another_folder(reference, pictures, tmp_path):
    other, folder = tmp_path / "pictures", tmp_path / "triplets"
    shutil.copytree(pictures, other)
    shutil.copytree(reference, folder)
    (folder / "shard-00001.safetensors").unlink()  # a run that was stopped
    before = contents(folder)
    content = (other / "1.png").read_bytes()
    Image.new("RGB", (40, 32), "red").save(other / "1.png")
    with (other / "1.png").open("ab") as file:
        file.truncate(len(content))  # zeros after the end of the image
    with pytest.raises(ValueError, match="expected pictures = "):
        generate(other, folder)
    assert contents(folder) == before


def test_another_vae_is_another_folder(reference, pictures, tmp_path):
    (tmp_path / "manifest.json").write_bytes((reference / "manifest.json").read_bytes())
    teacher = make_tiny_pipeline("diffusion")
    with torch.no_grad():
        teacher.vae.encoder.conv_in.bias += 1
    with pytest.raises(ValueError, match="expected vae_sha256"):
        generate(pictures, tmp_path, teacher)


def test_embeddings_are_stored_on_demand(pictures, tmp_path):
    rows = generate(pictures, tmp_path, num_triplets=3, store_text_embeddings=True).rows([0, 2])
    assert rows.text_embeddings["encoder_hidden_states"].shape == (2, 77, 16)


def test_noise_that_is_not_white_is_refused_at_the_first_batch(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"not white with unit variance.*Lower inversion_time"):
        generate(pictures, tmp_path, inversion_time=1.0)
    assert not contents(tmp_path)  # so that the same folder takes a lower one
    generate(pictures, tmp_path)


def test_what_cannot_be_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"no images of split 'test' in .*; set split to one of 'caption', 'train'"):
        generate(pictures, tmp_path, split="test")
    with pytest.raises(TypeError, match="Make one: RealTripletConfig"):
        generate_real_triplets(make_tiny_pipeline("diffusion"), pictures, tmp_path, TripletConfig(num_triplets=1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"above 0\.064, where the teacher's noise schedule begins, got 0\.06"):
        generate(pictures, tmp_path, inversion_time=0.06)
    oblong = make_tiny_pipeline("diffusion")
    oblong.unet.register_to_config(sample_size=[8, 16])
    with pytest.raises(ValueError, match=r"cropped to squares, and the teacher's latents are .*; set size"):
        generate(pictures, tmp_path, oblong)


def test_pictures_of_another_size_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, tmp_path / "images.safetensors")
    (tmp_path / "rows.jsonl").write_text('{"label": "a"}\n{"label": "b"}\n')
    with pytest.raises(ValueError, match=r"are \(4, 4, 4\), expected \(4, 8, 8\).* have \(16, 16\) pixels"):
        generate(tmp_path, tmp_path / "out")


def test_the_command_and_a_training_on_both_kinds(pictures, reference, tmp_path, capsys):
    teacher = str(tmp_path / "teacher")
    make_tiny_pipeline("diffusion").save_pretrained(teacher)
    folder = str(tmp_path / "real")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = ["real-triplets", "--teacher", teacher, "--output-dir", folder, *words]
    assert cli.main([*command, "--data", str(pictures), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output_dir": folder, "triplets": 8}
    joined = JoinedTriplets([folder, reference])
    assert torch.equal(joined.rows([1, 2]).data, joined.rows([9, 10]).data)
    train = [
        "--max-steps",
        "1",
        "--batch-size",
        "2",
        "--mixed-precision",
        "no",
        "--output-dir",
        str(tmp_path / "flow"),
    ]
    assert cli.main(["reflow", "--model", teacher, "--triplets", folder, str(reference), *train]) == 0
    assert cli.main([*command, "--data", str(tmp_path / "none")]) == 2
    assert "give a folder of images with a metadata.jsonl" in capsys.readouterr().err
