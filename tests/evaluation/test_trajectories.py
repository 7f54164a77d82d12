import pytest
import torch

from rectified_diffusers.evaluation.straightness import trajectories
from tests.tiny import make_tiny_pipeline


def test_the_ends_are_the_noise_and_the_picture():
    pipeline = make_tiny_pipeline("flow")
    found = trajectories(pipeline, "a cat", steps=4, values=10**6, seed=3)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = pipeline("a cat", latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="pt").images
    assert found.t.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert found.latents.shape == (5, 4 * 8 * 8)
    torch.testing.assert_close(found.latents[0].sort().values, noise.flatten().sort().values)
    torch.testing.assert_close(found.pixels[-1].sort().values, drawn.flatten().sort().values, atol=1e-4, rtol=1e-4)


def test_positions_are_the_same_for_all_models_and_a_diffusion_model_begins_late():
    flow = trajectories(make_tiny_pipeline("flow"), "a cat", steps=3, values=5)
    diffusion = trajectories(make_tiny_pipeline("diffusion"), "a cat", 2.0, steps=3, values=5)
    assert flow.latents.shape == diffusion.pixels.shape == (4, 5)
    assert 0 < diffusion.t[0] < 0.1
    torch.testing.assert_close(
        diffusion.latents[0] / flow.latents[0], (diffusion.latents[0] / flow.latents[0])[:1].expand(5)
    )
