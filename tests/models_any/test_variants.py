"""Pipelines with habits of their own work without a line of code for them; what cannot work is refused."""

from pathlib import Path

import pytest

from rectified_diffusers.models.any_pipeline import PipelineDenoiser
from rectified_diffusers.models.self_test import self_test
from tests.diffusers_suite.chain import run_chain
from tests.marks import slow_but
from tests.models_any.test_training import make_triplets
from tests.models_any.variants import REFUSED, WORKING, Variant


@pytest.mark.parametrize("kind", WORKING.values(), ids=WORKING)
def test_a_pipeline_with_a_habit_works(kind: type[Variant]) -> None:
    denoiser = PipelineDenoiser(kind.make())
    result = self_test(denoiser)
    assert result.euler is not None
    assert max(result.euler, result.prediction) <= 1e-5
    assert (result.noise_exact, result.decoding_exact) == (True, True)


FAST = "AsDataclass", "Inpaints", "Counts"


@pytest.mark.parametrize("name", slow_but(FAST, WORKING))
def test_a_few_step_lora_of_a_pipeline_with_a_habit(name: str) -> None:
    """Triplets, reflow and a LoRA, whose image the pipeline itself generates."""
    run_chain(WORKING[name].make(), {})


@pytest.mark.parametrize(("kind", "reason"), REFUSED.items(), ids=[kind.__name__ for kind in REFUSED])
def test_nothing_is_written_for_a_refused_pipeline(kind: type[Variant], reason: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=reason):
        make_triplets(kind.make(), tmp_path / "triplets", {})
    assert not (tmp_path / "triplets").exists()
