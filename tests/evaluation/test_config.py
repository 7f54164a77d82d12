import pytest

from rectified_diffusers.evaluation.config import EvaluationConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": ()}, "steps must be one or more different numbers of at least 1"),
        ({"steps": (0,)}, "steps must be one or more"),
        ({"steps": (1, 1)}, "steps must be one or more different"),
        ({"seeds": ()}, "seeds must be one or more"),
        ({"seeds": (-1,)}, "at least 0"),
        ({"num_pictures": 1}, "num_pictures must be at least 2"),
        ({"num_held_out": 1}, "num_held_out must be at least 2 or none"),
        ({"diversity_pictures": 1}, "diversity_pictures must be at least 2"),
        ({"diversity_prompts": -1}, "diversity_prompts must be at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"features": "clip"}, "features must be one of 'mobilenet_v2', 'inception_v3', got 'clip'"),
        ({"straightness_steps": 15}, "multiple of 10 bins"),
        ({"straightness_bins": 0}, "straightness_bins must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**options)
