"""What the page is given: pictures, on their way or done, and what is drawn beside the model. Free of torch."""

from dataclasses import dataclass

from PIL import Image

OWN_STEPS = 8  # of the model itself, in the place of a teacher that is not given


@dataclass(frozen=True)
class Drawing:
    """A picture, or the way to it while `step` is below `steps`.

    Attributes:
        image: None on the way if no preview is due.
        seconds: from the prompt to here, previews not counted.
    """

    image: Image.Image | None
    seconds: float
    step: int
    steps: int

    @property
    def done(self) -> bool:
        return self.step == self.steps


@dataclass(frozen=True)
class Comparison:
    """What is drawn beside the model: what it is called, and how it is drawn."""

    name: str
    steps: int
    guidance_scale: float
    remark: str = ""


def comparison_with(teacher: bool, steps: int, guidance_scale: float) -> Comparison:
    """Say what is drawn beside the model: its teacher, or the model itself with OWN_STEPS steps."""
    if teacher:
        return Comparison("Teacher", steps, guidance_scale)
    remark = "On the right is the same model, which learnt to need one step; --teacher MODEL puts another there."
    return Comparison("The same model", OWN_STEPS, 1.0, remark)
