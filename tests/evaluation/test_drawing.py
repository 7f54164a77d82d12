import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from rectified_diffusers.evaluation.gallery import CHUNK, Gallery, Sampler, cached, for_evaluation, pipeline_digest
from tests.tiny import make_tiny_pipeline


def test_a_picture_depends_on_its_seed_alone():
    pipeline = make_tiny_pipeline("flow")
    prompts, seeds = ["a cat", "the sea", "a cat"], ["0/0", "0/1", "0/2"]
    together = Sampler(pipeline, 2, 1.0, batch_size=3).sample(prompts, seeds)
    one_by_one = Sampler(pipeline, 2, 1.0, batch_size=1).sample(prompts, seeds)
    assert together.shape == (3, 3, 32, 32)
    assert (together.int() - one_by_one.int()).abs().max() <= 1  # rounding of another batch size
    assert not torch.equal(together[0], together[2])


def test_a_diffusion_model_is_solved_and_the_pipeline_left_alone():
    pipeline = make_tiny_pipeline("diffusion")
    scheduler = pipeline.scheduler
    adapted = for_evaluation(pipeline)
    assert isinstance(adapted.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler is scheduler
    assert adapted.unet is pipeline.unet
    flow = make_tiny_pipeline("flow")
    assert for_evaluation(flow).scheduler is flow.scheduler


def test_the_fingerprint_follows_the_weights():
    pipeline = make_tiny_pipeline("flow")
    before = pipeline_digest(pipeline)
    assert before == pipeline_digest(make_tiny_pipeline("flow"))
    with torch.no_grad():
        next(iter(pipeline.unet.parameters())).view(-1)[0].add_(1e-3)
    assert pipeline_digest(pipeline) != before


def test_a_gallery_makes_what_is_missing(tmp_path):
    made = []

    def make(first, last):
        made.append((first, last))
        return torch.arange(first, last, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()

    features = lambda images: images[:, 0, 0, :1].float()  # noqa: E731
    count = CHUNK + 5
    gallery = Gallery(tmp_path / "a", count, make)
    assert gallery.see("first", features)[:, 0].tolist() == list(range(count))
    assert made == [(0, CHUNK), (CHUNK, count)]
    (tmp_path / "a" / f"{CHUNK:06}.first.safetensors").unlink()  # the features of the second chunk, not its pictures
    assert gallery.see("first", features)[:, 0].tolist() == list(range(count))
    assert gallery.see("second", lambda images: 2 * features(images))[-1].item() == 2 * (count - 1)
    assert len(made) == 2
    unkept = Gallery(tmp_path / "b", count, make, keep=False)
    unkept.see("first", features)
    assert not (tmp_path / "b" / "000000.safetensors").exists()


def test_a_failed_file_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cached(tmp_path / "a.safetensors", fail)
    assert list(tmp_path.iterdir()) == []
