"""examples/emoji/teacher.py in small: from a flow it goes on as the diffusion model that the flow stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from rectified_diffusers import RectifiedFlowPipeline, bundled_checkpoint
from tests import emoji
from tests.emoji import SIZE, write_data
from tests.tiny import make_components, make_unet


@pytest.fixture
def run(monkeypatch, tmp_path):
    model, data, output = (tmp_path / name for name in ("model", "data", "teacher"))
    components = {**make_components(), "unet": make_unet(sample_size=SIZE // 4)}
    RectifiedFlowPipeline(**components, scheduler=None).save_pretrained(model)
    write_data(data)
    arguments = ["--data", str(data), "--vae", str(model / "vae"), "--output", str(output), "--mixed-precision", "no"]
    arguments += ["--batch-size", "2", "--ema-decay", "0", "--warmup-steps", "0", "--decay-steps", "0"]
    with emoji.example("teacher.py", monkeypatch) as example:
        yield lambda *more, **named: example(*arguments, "--initial-model", str(model), *more, **named)


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return load_file(folder / part / f"{name}.safetensors")


@pytest.mark.slow
def test_it_begins_with_a_flow_and_keeps_its_text_encoder(run, tmp_path):
    run("--max-steps", "2")
    teacher = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert teacher.scheduler.config.prediction_type == "v_prediction"
    kept, before = (weights(tmp_path / name, "text_encoder") for name in ("teacher", "model"))
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    trained, before = (weights(tmp_path / name, "unet") for name in ("teacher", "model"))
    assert not any(torch.equal(trained[name], before[name]) for name in trained)
    # Two small steps away from the flow, the last layer still points the way that noise - data does.
    turned = torch.nn.functional.cosine_similarity(trained["conv_out.weight"], before["conv_out.weight"], dim=1)
    assert (turned < -0.9).all()

    run("--max-steps", "3")  # goes on from the second step
    assert [file.name for file in sorted(tmp_path.glob("teacher/checkpoints/*"))] == ["2.safetensors", "3.safetensors"]


def test_a_diffusion_model_keeps_its_sign(run, tmp_path):
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    parts = run(name="teacher")
    flow, _ = parts["start_from"](tmp_path / "model")
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    diffusion, _ = parts["start_from"](tmp_path / "model")
    torch.testing.assert_close(flow.conv_out.weight, -diffusion.conv_out.weight, rtol=0, atol=0)
    torch.testing.assert_close(flow.conv_in.weight, diffusion.conv_in.weight, rtol=0, atol=0)


def test_the_loss_is_that_of_v(run, tmp_path):
    """A network that answers alpha * noise - sigma * data has no loss."""
    parts: dict[str, Any] = run(name="teacher")
    schedule = parts["noise_schedule"]()
    assert isinstance(schedule, DDPMScheduler)
    data = torch.full((4, 4, 16, 16), 0.5)

    class Exact(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x_t, timesteps, token_ids):
            alpha = schedule.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
            sigma = (1 - alpha**2).sqrt()
            noise = (x_t - alpha * 0.5) / sigma
            return alpha * noise - sigma * 0.5

    rows = [{"label": "square", "tags": [], "style": "flat", "split": "train"}] * 4
    args = type("Args", (), {"batch_size": 4, "prompt_dropout": 0.1})
    loss = parts["DiffusionLoss"](make_components()["tokenizer"], data, rows, args)
    generator = torch.Generator().manual_seed(0)
    assert loss(Exact(), generator, slice(None)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("folder", ["teacher"])
def test_a_kept_teacher_shares_its_other_parts_with_the_bundled_model(folder):
    """So that the one may be trained on what the other draws."""
    kept = emoji.FOLDER / folder
    for part in ("vae", "text_encoder"):
        ours, theirs = weights(kept, part), weights(bundled_checkpoint(), part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    teacher = StableDiffusionPipeline.from_pretrained(kept)
    assert teacher.scheduler.config.prediction_type == "v_prediction"
    bundled = RectifiedFlowPipeline.from_pretrained(bundled_checkpoint())
    assert teacher.tokenizer("a red apple, 3d style") == bundled.tokenizer("a red apple, 3d style")
