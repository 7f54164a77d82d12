"""Calls from several threads, from callbacks and of pipelines that share weights: never a wrong image."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image

from rectified_diffusers import (
    RectifiedFlowControlNetPipeline,
    RectifiedFlowImg2ImgPipeline,
    RectifiedFlowInpaintPipeline,
    RectifiedFlowPipeline,
    invert,
    optimize,
)
from tests.tiny import make_tiny_controlnet, make_tiny_pipeline
from tests.tiny_inputs import settings

pytestmark = pytest.mark.slow

IMAGE = Image.new("RGB", (32, 32), "red")


@pytest.fixture
def pipeline():
    made = make_tiny_pipeline("flow")
    made.set_progress_bar_config(disable=True)
    return made


def sample(pipeline, seed, steps, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        f"prompt {seed}", num_inference_steps=steps, generator=generator, output_type="pt", **kwargs
    ).images


def call(pipelines, number):
    pipeline = pipelines[number % len(pipelines)]
    kwargs = {"image": IMAGE, "strength": 0.5} if isinstance(pipeline, RectifiedFlowImg2ImgPipeline) else {}
    return sample(pipeline, number, 1 + number % 4, **kwargs)


@pytest.mark.parametrize("kind", ["one pipeline", "siblings", "an optimized pipeline"])
def test_threads_get_the_images_of_calls_one_by_one(pipeline, kind):
    pipelines = [pipeline]
    if kind == "siblings":
        pipelines += [RectifiedFlowImg2ImgPipeline.from_pipe(pipeline), RectifiedFlowPipeline.from_pipe(pipeline)]
        for sibling in pipelines:
            sibling.set_progress_bar_config(disable=True)
    if kind == "an optimized pipeline":
        optimize(pipeline, dtype=torch.bfloat16, blockwise_attention=True, pack_weights=True)
    expected = [call(pipelines, number) for number in range(24)]
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda number: call(pipelines, number), range(24)))
    assert all(map(torch.equal, images, expected))


@pytest.mark.parametrize("fast", [False, True])
def test_threads_may_invert_encode_and_call(pipeline, fast):
    """Tokenizers hold the padding of the last call: encoded at once, prompts had other lengths."""
    if fast:
        optimize(pipeline, lossless=True)
    other = RectifiedFlowPipeline(
        **{**pipeline.components, "unet": make_tiny_pipeline("flow", seed=5).unet}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    jobs = [
        lambda i: invert(pipeline, IMAGE, f"a {i}", 1),
        lambda i: sample(pipeline, i, 1 + i % 3),
        lambda i: sample(other, i, 1),
        lambda i: pipeline.encode_prompt(f"b {i}", "cpu", 1, True)[0],
    ]
    expected = [jobs[i % 4](i) for i in range(80)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda i: jobs[i % 4](i), range(80)))
    assert all(map(torch.equal, results, expected))


SIBLINGS = {
    "from_pipe": lambda pipeline: RectifiedFlowPipeline.from_pipe(pipeline),
    "image to image": lambda pipeline: RectifiedFlowImg2ImgPipeline.from_pipe(pipeline),
    "AutoPipelineForImage2Image": lambda pipeline: AutoPipelineForImage2Image.from_pipe(pipeline),
    "AutoPipelineForInpainting": lambda pipeline: AutoPipelineForInpainting.from_pipe(pipeline),
    "the constructor": lambda pipeline: RectifiedFlowInpaintPipeline(
        **pipeline.components, requires_safety_checker=False
    ),
    "a ControlNet": lambda pipeline: RectifiedFlowControlNetPipeline.from_pipe(
        pipeline, controlnet=make_tiny_controlnet(pipeline.unet)
    ),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_share_weights_and_have_their_own_schedulers(pipeline, name):
    pipeline.scheduler = type(pipeline.scheduler)(shift=2.0)
    sibling = SIBLINGS[name](pipeline)
    assert sibling.unet is pipeline.unet
    assert sibling.scheduler is not pipeline.scheduler
    assert settings(sibling.scheduler) == settings(pipeline.scheduler)


def test_an_assigned_scheduler_is_kept_unless_another_pipeline_has_it(pipeline):
    sibling = RectifiedFlowPipeline.from_pipe(pipeline)
    own = type(pipeline.scheduler)(shift=3.0)
    pipeline.scheduler = own
    assert pipeline.scheduler is own
    sibling.scheduler = own
    assert sibling.scheduler is not own
    assert sibling.scheduler.config["shift"] == 3.0
    pipeline.scheduler = own
    assert pipeline.scheduler is own


def test_a_preview_in_a_callback_leaves_the_outer_call_alone(pipeline):
    preview, previews = RectifiedFlowPipeline.from_pipe(pipeline), []

    def callback(pipe, step, timestep, tensors):
        previews.append(sample(preview, 7, 2))
        return tensors

    expected, alone = sample(pipeline, 3, 4), sample(preview, 7, 2)
    assert torch.equal(sample(pipeline, 3, 4, callback_on_step_end=callback), expected)
    assert len(previews) == 4
    assert all(torch.equal(each, alone) for each in previews)


def test_a_call_within_a_call_is_refused_and_the_next_call_works(pipeline):
    def callback(pipe, step, timestep, tensors):
        sample(pipe, 7, 2)
        return tensors

    expected = sample(pipeline, 3, 4)
    with pytest.raises(RuntimeError, match=r"generating already.*from_pipe\(pipeline\)"):
        sample(pipeline, 3, 4, callback_on_step_end=callback)
    assert torch.equal(sample(pipeline, 3, 4), expected)


def test_an_error_in_one_thread_lets_the_others_go_on(pipeline):
    expected = sample(pipeline, 1, 2)

    def run(number):
        if number % 2:
            with pytest.raises(ValueError, match="latents must"):
                sample(pipeline, 1, 2, latents=torch.zeros(1, 3, 8, 8))
            return expected
        return sample(pipeline, 1, 2)

    with ThreadPoolExecutor(3) as threads:
        assert all(torch.equal(image, expected) for image in threads.map(run, range(12)))
