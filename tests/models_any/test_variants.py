"""Pipelines with habits of their own work without a line of code for them; what cannot work is refused."""

import pytest

from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.self_test import self_test
from rectified_diffusers.models.watching import UnsupportedPipelineError
from tests.models_any.variants import REFUSED, WORKING, Variant


@pytest.mark.parametrize("kind", WORKING.values(), ids=WORKING)
def test_a_pipeline_with_a_habit_works(kind: type[Variant]) -> None:
    denoiser = PipelineDenoiser(kind.make())
    result = self_test(denoiser)
    assert result.euler is not None
    assert max(result.euler, result.prediction) <= 1e-5
    assert (result.noise_exact, result.decoding_exact) == (True, True)


@pytest.mark.parametrize(("kind", "reason"), REFUSED.items(), ids=[kind.__name__ for kind in REFUSED])
def test_a_pipeline_that_cannot_be_adapted_is_refused_with_the_reason(kind: type[Variant], reason: str) -> None:
    with pytest.raises(UnsupportedPipelineError) as refused:
        self_test(PipelineDenoiser(kind.make()))
    assert reason in str(refused.value)
