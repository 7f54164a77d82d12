"""Triplets: exact pairs, the same whatever the batches, the order of work and the kills on the way."""

import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import tracemalloc
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.triplet_memory import write_synthetic
from safetensors.torch import load_file

from rectified_diffusers.data import claims as claims_module
from rectified_diffusers.data import dataset as dataset_module
from rectified_diffusers.data import generate as generate_module
from rectified_diffusers.data.claims import Claims
from rectified_diffusers.data.config import TripletConfig
from rectified_diffusers.data.dataset import TripletDataset, Triplets, verify_triplets
from rectified_diffusers.data.generate import draw_noise, generate_triplets
from rectified_diffusers.data.manifest import Manifest, first_difference
from rectified_diffusers.data.shards import shard_path, write_shard
from rectified_diffusers.data.teacher import Teacher
from tests.forks import call_in_fork
from tests.tiny import make_tiny_pipeline

PROMPTS = ["a red apple", "", "the café"]
OPTIONS: dict[str, Any] = {
    "num_triplets": 10,
    "triplets_per_shard": 4,
    "batch_size": 3,
    "num_inference_steps": 2,
    "seed": 7,
}
WAIT = 300  # seconds, for what happens in another thread
KILLED = -getattr(signal, "SIGALRM", 0)


def generate(folder, teacher=None, prompts=PROMPTS, progress=False, **options):
    teacher = teacher or make_tiny_pipeline("diffusion")
    return generate_triplets(teacher, prompts, folder, TripletConfig(**{**OPTIONS, **options}), progress=progress)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Return the files of one uninterrupted run by name."""
    folder = tmp_path_factory.mktemp("reference")
    generate(folder)
    return contents(folder)


@pytest.fixture
def folder(tmp_path, reference):
    """Return a folder with a finished run, to be damaged."""
    for name, content in reference.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_files_and_manifest(reference):
    names = ["manifest.json", *(f"shard-0000{shard}.safetensors" for shard in range(3))]
    assert sorted(reference) == names
    manifest = json.loads(reference["manifest.json"])
    expected = {"num_triplets": 10, "seed": 7, "storage_dtype": "float16", "latent_shape": [4, 8, 8], "num_prompts": 3}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["vae_scaling_factor"] == 0.18215
    assert "batch_size" not in manifest


def test_a_second_run_repeats_the_first_bit_for_bit(tmp_path, reference):
    generate(tmp_path)
    assert contents(tmp_path) == reference


def test_a_run_makes_only_what_is_missing(folder, reference, monkeypatch):
    (folder / "shard-00001.safetensors").unlink()
    (folder / ".tmp-17-shard-00001.safetensors").write_bytes(b"torn")
    written = []
    monkeypatch.setattr(
        generate_module, "write_shard", lambda path, *rest: (written.append(path.name), write_shard(path, *rest))
    )
    generate(folder)
    assert written == ["shard-00001.safetensors"]
    assert contents(folder) == reference


def test_the_batch_size_leaves_the_noise_and_rounds_the_data(tmp_path, folder):
    ours, other = TripletDataset(folder).rows(range(10)), generate(tmp_path / "other", batch_size=16).rows(range(10))
    assert torch.equal(ours.noise, other.noise)
    assert ours.prompts == other.prompts
    # Data of this untrained teacher goes up to 20; convolutions of other batches round otherwise in float32, and
    # that may tip the rounding to float16.
    torch.testing.assert_close(ours.data, other.data, rtol=2**-10, atol=1e-4)


def test_a_shorter_run_is_the_beginning_of_a_longer_one(tmp_path, folder):
    short = generate(tmp_path / "short", num_triplets=6)
    assert torch.equal(short.rows(range(6)).noise, TripletDataset(folder).rows(range(6)).noise)


def test_noise_follows_from_seed_and_shard():
    shape = (2, 4, 8, 8)
    draws = [draw_noise(seed, shard, shape) for seed, shard in ((0, 0), (0, 1), (1, 0), (0, 10), (0, 0))]
    assert torch.equal(draws[0], draws[-1])
    assert all(not torch.equal(a, b) for i, a in enumerate(draws[:-1]) for b in draws[i + 1 : -1])
    torch.testing.assert_close(draws[0].flatten()[:2], torch.tensor([0.0703594833, 1.2462025881]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize("dtypes", [(torch.float32, "float16"), (torch.bfloat16, "float16")], ids=str)
def test_the_teacher_repeats_the_stored_data_from_the_stored_noise(tmp_path, kind, dtypes):
    pipeline = make_tiny_pipeline(kind).to(dtypes[0])
    dataset = generate(tmp_path, pipeline, storage_dtype=dtypes[1])
    rows = dataset.rows([4, 5, 6])  # the first batch of the second shard
    pipeline.scheduler = Teacher.of(pipeline, TripletConfig(**OPTIONS)).pipeline.scheduler
    data: Any = pipeline(
        rows.prompts,
        num_inference_steps=2,
        guidance_scale={"diffusion": 7.5, "flow": 1.0}[kind],  # the defaults of their calls
        latents=rows.noise.to(dtypes[0]),
        output_type="latent",
        return_dict=False,
    )[0]
    assert torch.equal(data.half().float(), rows.data)
    assert rows.data.std() > 0


def test_rows_come_in_the_order_asked(folder, reference):
    (folder / "copy.safetensors").write_bytes(reference["shard-00002.safetensors"])
    last = load_file(folder / "copy.safetensors")
    dataset = TripletDataset(folder)
    assert len(dataset) == 10
    rows = dataset.rows([9, 0, 8, 9])
    assert rows.prompts == [PROMPTS[0], PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    assert rows.noise.dtype == rows.data.dtype == torch.float32
    for name in ("noise", "data"):
        ours = getattr(rows, name)
        assert torch.equal(ours[[0, 2, 3]], last[name][[1, 0, 1]].float())
        assert torch.equal(ours[1], getattr(dataset.rows([0]), name)[0])
    assert torch.equal(dataset.rows(torch.tensor([9])).data[0], rows.data[0])
    assert dataset.rows([]).noise.shape == (0, 4, 8, 8)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=rf"in \[0, 10\), got {index}"):
            dataset.rows([0, index])


@pytest.mark.parametrize("readers", [1, 8])
def test_few_shards_are_open_at_once(folder, monkeypatch, readers):
    """One reader opens each shard once; several may close a shard that another has not finished."""
    monkeypatch.setattr(dataset_module, "_READERS", readers)
    monkeypatch.setattr(dataset_module, "_OPEN_SHARDS", 1)
    opened = []
    open_shard = dataset_module.open_shard
    monkeypatch.setattr(dataset_module, "open_shard", lambda *args: (opened.append(args[-1]), open_shard(*args))[1])
    dataset = TripletDataset(folder)
    opened.clear()
    dataset.rows([0, 9, 1, 8, 2])
    assert (opened if readers == 1 else sorted(set(opened))) == [0, 2]
    assert dataset._kept.cache_info().currsize == 1


def test_triplets_of_unequal_lengths_raise():
    latents = torch.zeros(2, 4, 8, 8)
    assert len(Triplets(["a", "b"], latents, latents)) == 2
    with pytest.raises(ValueError, match="got 1 prompts, noise"):
        Triplets(["a"], latents, latents)
    with pytest.raises(ValueError, match="noise and data of one shape"):
        Triplets(["a", "b"], latents, latents[:1])
    with pytest.raises(TypeError, match=r"^data must be of type Tensor, .*Triplets hold latents \(B, C, H, W\)\.$"):
        Triplets(["a"], latents[:1], [[0.0]])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 1.5}, "expected guidance_scale = 7.5, got 1.5"),
        ({"seed": 8, "guidance_scale": 1.5}, "expected seed = 7, got 8"),
        ({"num_triplets": 11}, "expected num_triplets = 10, got 11"),
        ({"prompts": ["a", "b", "c"]}, "expected prompts_sha256 = "),
        ({"solver": "teacher"}, "expected solver = 'DPMSolverMultistepScheduler', got 'DDIMScheduler'"),
        ({"solver": "UniPCMultistepScheduler"}, "expected solver = .*, got 'UniPCMultistepScheduler'"),
        ({"num_inference_steps": 3}, "expected num_inference_steps = 2, got 3"),
        ({"triplets_per_shard": 5}, "expected triplets_per_shard = 4, got 5"),
        ({"storage_dtype": "float32"}, "expected storage_dtype = 'float16', got 'float32'"),
        ({"mixed_precision": "bf16"}, "expected mixed_precision = 'no', got 'bf16'"),
        ({"height": 64}, r"expected latent_shape = \[4, 8, 8\], got \[4, 16, 8\]"),
        ({"width": 64}, r"expected latent_shape = \[4, 8, 8\], got \[4, 8, 16\]"),
        ({"store_text_embeddings": True}, r"expected text_embeddings = None, got \{'encoder_hidden_states': \[77, 16"),
    ],
    ids=str,
)
def test_other_settings_raise(folder, reference, options, message):
    with pytest.raises(ValueError, match=f"{message}.*Use the settings in .*manifest.json to continue"):
        generate(folder, **options)
    assert contents(folder) == reference


def test_every_option_is_held_to_but_the_batch_size():
    """The test above changes all of them; this one tells whoever adds an option to add it there."""
    held = {"guidance_scale", "seed", "num_triplets", "solver", "num_inference_steps", "triplets_per_shard"}
    held |= {"storage_dtype", "mixed_precision", "height", "width", "store_text_embeddings"}
    # Recorded for other pipelines than Stable Diffusion's, which take no call_options.
    held |= {"call_options"}
    assert {field.name for field in fields(TripletConfig)} == held | {"batch_size"}


def test_another_teacher_or_schedule_raises(folder):
    with pytest.raises(ValueError, match="expected teacher_sha256"):
        generate(folder, make_tiny_pipeline("diffusion", seed=1))
    teacher = make_tiny_pipeline("diffusion")
    teacher.scheduler = type(teacher.scheduler).from_config(teacher.scheduler.config, beta_end=0.02)
    with pytest.raises(ValueError, match=r"expected solver_config.beta_end = 0.012, got 0.02"):
        generate(folder, teacher)


def test_another_release_is_a_warning_and_new_solver_options_are_none(folder, reference, caplog):
    manifest = json.loads(reference["manifest.json"])
    manifest["made_with"]["versions"]["torch"] = "1.0"
    content = json.dumps(manifest, indent=2).encode()
    (folder / "manifest.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        generate(folder)
    assert "started with versions.torch = '1.0'" in caplog.text
    assert (folder / "manifest.json").read_bytes() == content
    difference = first_difference({"solver_config": {"a": 1}}, {"solver_config": {"a": 1, "b": 2}})
    assert difference is None
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)


@pytest.mark.parametrize("function", [generate, verify_triplets])
def test_a_torn_shard_raises(folder, function):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is no whole shard.*Delete it"):
        function(folder)


@pytest.mark.parametrize("function", [generate, verify_triplets, TripletDataset])
def test_a_shard_of_another_set_or_place_raises(tmp_path, folder, reference, function):
    (folder / "shard-00000.safetensors").write_bytes(reference["shard-00001.safetensors"])
    with pytest.raises(
        ValueError, match=r"shard-00000.safetensors does not belong.*expected number 0, got 1.*Delete it"
    ):
        function(folder)
    generate(tmp_path / "other", seed=8)
    (tmp_path / "other" / "shard-00000.safetensors").replace(folder / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"shard-00000.safetensors does not belong.*expected manifest '\w{64}', got"):
        function(folder)


def test_missing_shards_raise_with_the_way_on(folder):
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing.*shard-00001.*`rectified-diffusers triplets`"):
        TripletDataset(folder)


def test_a_folder_without_a_sound_manifest_raises(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="give a folder that generate_triplets has written"):
        TripletDataset(tmp_path / "none")
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest[:-20])
    with pytest.raises(ValueError, match="is no manifest of triplets"):
        TripletDataset(folder)
    (folder / "manifest.json").write_text(manifest.replace('"format": 1', '"format": 3'))
    with pytest.raises(ValueError, match="has format 3, expected 1 or 2"):
        TripletDataset(folder)
    for entry in ('"num_triplets": "20"', '"num_triplets": -1', '"num_triplets": null'):
        damaged = re.sub(r'"num_triplets": \d+', entry, manifest)
        assert damaged != manifest
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest.json: expected num_triplets to be .*, got .*; restore it"):
            TripletDataset(folder)


def test_verify_names_every_damaged_shard(folder):
    assert len(verify_triplets(folder)) == 10
    path = folder / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (folder / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 shards .* not sound:\n.*00000.* fails its checksum.*\n.*00002"):
        verify_triplets(folder)


def smooth(shape, generator):
    """Return data similar to latents of images: unit variance, similar neighbors."""
    noise = torch.randn(*shape[:-2], shape[-2] + 2, shape[-1] + 2, generator=generator)
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1) * 3


@pytest.mark.parametrize(
    ("noise", "data", "match"),
    [
        ("smooth", "white", r"swapped in .*\(std [\d.]+, lag-1 autocorrelation [\d.]+\).*Exchange the two tensors"),
        ("smooth", "smooth", r"not white with unit variance: .*tion 0, got std.* Make the triplets again\.$"),
        ("loud", "smooth", r"got std 1\.99\d, lag-1 autocorrelation -?0\.0"),
        ("zero", "smooth", "got std 0.000, lag-1 autocorrelation 0.000"),
    ],
)
def test_noise_that_is_not_noise_raises(folder, noise, data, match):
    generator = torch.Generator().manual_seed(0)
    manifest = Manifest.read(folder)
    for shard, rows in enumerate((4, 4, 2)):
        shape = (rows, 4, 8, 8)
        white = torch.randn(shape, generator=generator).half()
        made = {"white": white, "loud": 2 * white, "zero": 0 * white, "smooth": smooth(shape, generator).half()}
        header = {"shard": shard, "manifest": manifest.identity, "prompts": [""] * rows}
        write_shard(shard_path(folder, shard), {"noise": made[noise], "data": made[data].clone()}, header)
    with pytest.raises(ValueError, match=match):
        TripletDataset(folder)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 2, 2), (1, 4, 8, 8), (32, 4, 32, 32)])
def test_right_noise_is_never_refused(shape):
    generator = torch.Generator().manual_seed(0)
    assert all(dataset_module._is_unit_white(torch.randn(shape, generator=generator)) for _ in range(50))


def test_data_that_is_not_finite_raises_and_keeps_the_shards_before(tmp_path, reference):
    teacher = make_tiny_pipeline("diffusion")
    forward, calls = teacher.unet.forward, []

    def break_down(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(None)
        if len(calls) > 4:  # two steps for each of two batches in the first shard
            output[0][-1] = torch.nan  # of the last prompt in the batch
        return output

    teacher.unet.forward = break_down
    with pytest.raises(ValueError, match=r"data for prompt 'a red apple' in shard 1 is not finite in torch.float16"):
        generate(tmp_path, teacher)
    assert contents(tmp_path).keys() == {"manifest.json", "shard-00000.safetensors"}
    generate(tmp_path)
    assert contents(tmp_path) == reference


def broken_teacher(before=lambda: None):
    """Return a teacher that predicts NaN, and call `before` before each prediction."""
    teacher = make_tiny_pipeline("diffusion")
    forward = teacher.unet.forward

    def break_down(*args, **kwargs):
        before()
        output = forward(*args, **kwargs)
        output[0].fill_(torch.nan)
        return output

    teacher.unet.forward = break_down
    return teacher


def test_first_triplets_that_are_refused_leave_no_manifest_that_was_not_there(tmp_path, reference):
    path = tmp_path / "manifest.json"
    with pytest.raises(ValueError, match="in shard 0 is not finite"):
        generate(tmp_path, broken_teacher())
    assert not path.exists()
    with pytest.raises(ValueError, match="in shard 0 is not finite"):  # and another process took it back already
        generate(tmp_path, broken_teacher(before=lambda: path.unlink(missing_ok=True)))
    path.write_bytes(reference["manifest.json"])
    with pytest.raises(ValueError, match="in shard 0 is not finite"):
        generate(tmp_path, broken_teacher())
    assert contents(tmp_path) == {"manifest.json": reference["manifest.json"]}


def test_prompts_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(tmp_path / "new", prompts=[])
    assert not (tmp_path / "new").exists()


def test_options_of_another_kind_are_refused(tmp_path):
    remedy = r"Make one: TripletConfig\(num_triplets=1000\)\.$"
    with pytest.raises(TypeError, match=rf"^config must be of type TripletConfig, got .*{remedy}"):
        generate_triplets(make_tiny_pipeline("diffusion"), PROMPTS, tmp_path, OPTIONS)  # pyright: ignore[reportArgumentType]


def test_folders_on_the_way_are_made(tmp_path):
    assert len(generate(tmp_path / "new" / "newer", num_triplets=1)) == 1


def test_without_progress_nothing_is_shown(folder, capfd):
    generate(folder)
    assert capfd.readouterr() == ("", "")


def test_one_progress_bar_counts_images_from_where_the_run_stopped(folder, capfd):
    (folder / "shard-00001.safetensors").unlink()
    generate(folder, progress=True)
    shown = capfd.readouterr().err
    assert "Triplets: " in shown
    assert "6/10" in shown
    assert "10/10" in shown
    assert "image/s" in shown or "s/image" in shown
    assert "2/2" not in shown  # the teacher's own bar, of two steps


def generate_to_a_kill(folder: Path, teacher: Any, moment: float, options: dict[str, Any]) -> None:
    """Generate triplets in a process that the system ends, without a word, some seconds after its next file."""
    replace = Path.replace

    def replace_and_die_soon(self: Path, target: Any) -> Path:
        Path.replace = replace
        signal.setitimer(signal.ITIMER_REAL, moment)
        return self.replace(target)

    Path.replace = replace_and_die_soon
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    generate(folder, teacher, **options)


def generate_with_kills(whole: Path, killed: Path) -> list[int | None]:
    """Kill a run six times soon after its next file, in a process that forks them, and return their exit codes."""
    torch.set_num_threads(1)
    teacher, options = make_tiny_pipeline("diffusion"), {"num_triplets": 24, "triplets_per_shard": 2, "batch_size": 2}
    generate(whole, teacher, **options)
    killed.mkdir()
    moments, exit_codes = random.Random(0), []
    for _ in range(6):
        arguments = killed, teacher, moments.uniform(1e-6, 0.04), options
        run = multiprocessing.get_context("fork").Process(target=generate_to_a_kill, args=arguments)
        run.start()
        run.join()
        exit_codes.append(run.exitcode)
        if run.exitcode == KILLED and moments.random() < 0.5:  # a moment that is too short to be met at every run
            killed.joinpath(".tmp-1-shard-00011.safetensors").write_bytes(b"torn")
    generate(killed, teacher, **options)
    return exit_codes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills need fork")
def test_a_run_killed_again_and_again_ends_in_the_same_files(tmp_path):
    exit_codes = call_in_fork(generate_with_kills, tmp_path / "whole", tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert set(exit_codes) <= {KILLED, 0}
    assert exit_codes[:2] == [KILLED, KILLED]


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_a_bit_that_flipped_is_found_when_its_row_is_read(folder):
    dataset = TripletDataset(folder)
    path = folder / "shard-00001.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    dataset.rows([0, 4, 5, 6, 8])
    with pytest.raises(ValueError, match=r"Row 3 of .*shard-00001.safetensors fails its checksum.*make it again"):
        dataset.rows([0, 7])


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * 2 * 4 * 8 * 8 * 2 - 1))
    with pytest.raises(OSError, match=r"No space left .*: it takes 10,240 bytes, 10,239 bytes are free"):
        generate(tmp_path)
    assert contents(tmp_path).keys() == {"manifest.json"}


def test_a_disk_that_fills_up_keeps_what_is_whole(tmp_path, reference, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(None)
        if len(calls) == 5:  # after the manifest and one shard, each with its folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left in .* for shard-00001.safetensors: [\d,.]+ \w+ are free"):
        generate(tmp_path)
    assert contents(tmp_path).keys() == {"manifest.json", "shard-00000.safetensors"}
    monkeypatch.undo()
    generate(tmp_path)
    assert contents(tmp_path) == reference


def test_a_run_that_goes_on_reads_what_is_there(folder):
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} fails its checksum.*make it again"):
        generate(folder)  # says so of the whole file; opening it as a dataset would read a few rows


def test_a_process_makes_what_is_free_and_waits_for_the_others(tmp_path, reference, monkeypatch, capfd):
    """Another process has claimed a shard, which comes while this one waits."""
    monkeypatch.setattr(generate_module, "_WAIT", 0)
    waits = []

    def wait(_: float) -> None:
        assert contents(tmp_path).keys() - {".tmp-claim-00001"} == reference.keys() - {"shard-00001.safetensors"}
        waits.append(None)
        if len(waits) == 3:
            (tmp_path / "shard-00001.safetensors").write_bytes(reference["shard-00001.safetensors"])
            (tmp_path / ".tmp-claim-00001").unlink()

    remove = generate_module.remove_leftovers
    monkeypatch.setattr(
        generate_module, "remove_leftovers", lambda folder: (remove(folder), (folder / ".tmp-claim-00001").touch())
    )
    monkeypatch.setattr(generate_module.time, "sleep", wait)
    generate(tmp_path, progress=True)
    assert len(waits) == 3
    assert contents(tmp_path) == reference
    assert "10/10" in capfd.readouterr().err, "the other process's triplets count"


def test_a_claim_without_heartbeat_is_taken_over(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    path, claims = tmp_path / ".tmp-claim-00004", Claims(tmp_path)
    path.touch()
    free = []
    for beat in range(3):  # a minute apart, then none
        os.utime(path, (beat, beat))
        for _ in range(6):
            clock.now += 10
            with claims.claim(4) as is_free:
                free.append(is_free)
    while not free[-1]:
        clock.now += 10
        with claims.claim(4) as is_free:
            free.append(is_free)
    assert free == [False] * (2 * 6 + 12) + [True], "120 seconds after the last beat was seen"
    assert not path.exists()
    with Claims(tmp_path).claim(4) as is_free:
        assert is_free


def test_a_claim_beats_until_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "BEAT", 0.01)
    path = tmp_path / ".tmp-claim-00004"
    with Claims(tmp_path).claim(4) as free:
        assert free
        for _ in range(2):
            os.utime(path, (0, 0))
            deadline = time.monotonic() + WAIT
            while not path.stat().st_mtime and time.monotonic() < deadline:
                time.sleep(0.01)
            assert path.stat().st_mtime
    assert not path.exists()


def test_a_shard_whose_making_fails_is_free_again(tmp_path):
    claims = Claims(tmp_path)
    with pytest.raises(ValueError, match="not finite"), claims.claim(0):
        raise ValueError("not finite")
    with claims.claim(0) as free, claims.claim(0) as twice:
        assert (free, twice) == (True, False)
    assert list(tmp_path.iterdir()) == []


def test_every_process_verifies_its_part_and_raises_for_damage_in_any(folder, monkeypatch):
    manifest, exchanged = TripletDataset(folder).manifest, []
    monkeypatch.setattr(generate_module, "reduce", lambda flags, _: (exchanged.append(flags.tolist()), flags)[1])
    path = folder / "shard-00002.safetensors"
    path.rename(folder / "away")
    for index in (0, 1):
        place: Any = SimpleNamespace(process_index=index, num_processes=2, is_main_process=not index, device="cpu")
        generate_module._missing_shards(folder, manifest, place)
    assert exchanged == [[1, 0, 0], [0, 1, 0]]
    content = bytearray((folder / "away").read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(generate_module, "reduce", lambda flags, _: torch.tensor([1, 1, 2]))
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors fails its checksum"):
        generate_module._missing_shards(folder, manifest, place)


def test_another_run_in_the_folder_does_no_harm(tmp_path, reference, monkeypatch, capfd):
    """While the first shard is made, another run makes the others: the first run makes that one and no more."""
    make, made = generate_module._make_shard, []

    def make_and_let_others_come(*args):
        made.append(args[2])
        make(*args)
        for name in ("shard-00001.safetensors", "shard-00002.safetensors"):
            (tmp_path / name).write_bytes(reference[name])

    monkeypatch.setattr(generate_module, "_make_shard", make_and_let_others_come)
    generate(tmp_path, progress=True)
    assert made == [0]
    assert "10/10" in capfd.readouterr().err, "the other run's triplets count"
    assert contents(tmp_path) == reference


# ---------------------------------------------------------------------------------------------- text embeddings


def test_stored_text_embeddings_are_those_of_the_text_encoder(tmp_path, folder):
    teacher: Any = make_tiny_pipeline("diffusion")
    dataset = generate(tmp_path / "stored", teacher, store_text_embeddings=True)
    assert dataset.manifest.text_embeddings == {"encoder_hidden_states": (77, 16)}
    rows, plain = dataset.rows([9, 0, 5]), TripletDataset(folder).rows([9, 0, 5])
    expected, _ = teacher.encode_prompt(rows.prompts, "cpu", 1, False)
    assert rows.text_embeddings["encoder_hidden_states"].dtype == torch.float32
    torch.testing.assert_close(
        rows.text_embeddings["encoder_hidden_states"], expected.detach(), rtol=2**-10, atol=1e-3
    )
    assert torch.equal(rows.noise, plain.noise)
    assert torch.equal(rows.data, plain.data)
    assert plain.text_embeddings == {}
    assert len(verify_triplets(tmp_path / "stored")) == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_teachers(tmp_path, dtype):
    dataset = generate(tmp_path, make_tiny_pipeline("flow").to(dtype), store_text_embeddings=True)
    assert dataset.manifest.settings["teacher_dtype"] == str(dtype).removeprefix("torch.")
    assert dataset.rows(range(10)).data.isfinite().all()


def test_the_dataset_holds_nothing_per_triplet(tmp_path, monkeypatch):
    """Peak memory of opening and reading, in 50 and in 1000 shards; `benchmarks/triplet_memory.py` has 10 million."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(dataset_module, "_OPEN_SHARDS", 16)
    peaks = []
    for shards in (50, 1000):
        folder = tmp_path / str(shards)
        write_synthetic(folder, num_triplets=shards * 4, triplets_per_shard=4)
        tracemalloc.start()
        dataset = TripletDataset(folder)
        for start in range(0, 64, 8):
            dataset.rows([index * len(dataset) // 64 for index in range(start, start + 8)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
