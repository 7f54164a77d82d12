"""The style sheet, scripts and HTML fragments of the page."""

from html import escape
from pathlib import Path

from rectified_diffusers.demo.requests import Comparison, Generation


def packaged(name: str) -> str:
    """Return the text of a file of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def title(about: str) -> str:
    return f"<h1>From a prompt to an image in one step</h1><p>{escape(about)}</p>"


def seconds(value: float) -> str:
    """Return a time formatted with about two significant digits, such as 78 ms or 1.9 s."""
    return f"{1000 * value:.0f} ms" if value < 0.995 else f"{value:.1f} s"


def caption(name: str, text: str = "", time: str = "", tooltip: str = "") -> str:
    """Return a caption: a name in bold, a time as HTML, and a text."""
    title = f' title="{escape(tooltip)}"' if tooltip else ""
    return f'<div class="caption"{title}><b>{escape(name)}</b>{time}<span class="text">{escape(text)}</span></div>'


def own_caption(generation: Generation | None = None, prompt: str = "") -> str:
    """Return the caption with the model's generation time. The prompt is its tooltip."""
    if generation is None:
        return caption("One step", "type to generate an image")
    steps = "One step" if generation.steps == 1 else f"{generation.steps} steps"
    return caption(steps, "", f'<span class="time fast">{seconds(generation.seconds)}</span>', prompt)


def comparison_caption(
    comparison: Comparison, generation: Generation | None = None, own_seconds: float = 0.0, prompt: str = ""
) -> str:
    """Return the caption of the comparison: its name, a progress bar while it runs, and its relative duration."""
    name, text, time, progress = f"{comparison.name}, {comparison.steps} steps", "press Enter to generate", "", 0.0
    if generation is not None:
        time = f'<span class="time">{seconds(generation.seconds)}</span>'
        text = f"{generation.seconds / own_seconds:.0f}× as long" if own_seconds else ""
        if not generation.done:
            text, progress = f"step {generation.step}", generation.step / generation.steps
    bar = f'<div class="bar"><div style="width: {100 * progress:.0f}%"></div></div>'
    return caption(name, text, time, prompt) + bar


def remark(*parts: str) -> str:
    return f'<div class="remark">{" ".join(escape(part) for part in parts if part)}</div>'
