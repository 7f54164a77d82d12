"""The style sheet, script and HTML fragments of the page."""

from html import escape

from rectified_diffusers.demo.requests import Comparison, Drawing

CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
body {background: #f8fafc}
.gradio-container main {padding-top: .4rem !important; width: 100%; min-width: min(1180px, 98vw)}
footer {display: none !important}
#title h1 {font-size: 2rem; font-weight: 800; letter-spacing: -.02em; margin: 0; display: inline-block;
  background: linear-gradient(90deg, #f97316, #db2777 55%, #7c3aed); background-clip: text; color: transparent}
#title p {margin: 0 0 .2rem; color: var(--body-text-color-subdued); font-size: .9rem}
#prompt textarea {font-size: 1.35rem; line-height: 1.4; padding: .7rem .9rem; border-radius: 12px;
  border: 2px solid var(--border-color-primary); background: var(--background-fill-primary)}
#prompt textarea:focus {border-color: #db2777}
.caption {display: flex; align-items: baseline; gap: .6rem; height: 2.5rem; padding: 0 .2rem;
  white-space: nowrap; overflow: hidden}
.caption b {font-size: 1rem}
.caption .time {font-size: 1.5rem; font-weight: 800; font-variant-numeric: tabular-nums; letter-spacing: -.02em}
.caption .fast {color: #db2777}
.caption .says, .remark {color: var(--body-text-color-subdued); font-size: .85rem}
.bar {width: 100%; height: 4px; border-radius: 2px; margin-top: -4px}
.bar div {height: 100%; border-radius: 2px; background: linear-gradient(90deg, #f97316, #db2777)}
.picture {background: #fff !important; border: 1px solid var(--border-color-primary) !important;
  border-radius: 14px !important}
.picture img {width: 100%; height: 100%; object-fit: contain}
.sketch canvas {width: 100%; max-width: 400px; background: #fff; border: 1px solid var(--border-color-primary);
  border-radius: 14px; touch-action: none; cursor: crosshair; display: block}
.sketch button {margin: .4rem .4rem 0 0; padding: .2rem .9rem; border-radius: 8px;
  border: 1px solid var(--border-color-primary)}
.remark {min-height: 1.3rem; padding: 0 .2rem}
#history .thumbnail-item {border-radius: 10px; background: #fff}
#history .caption-label {display: none}
"""

# In gradio 6.31, a textbox sends its `input` event only for key presses, not for paste, cut or deletion, nor for text
# from an input method or voice input. The browser's event covers all of these. It is forwarded once gradio has read
# the text.
TYPING_SCRIPT = """
document.addEventListener('input', (event) => {
  if (event.target.closest('#prompt')) setTimeout(() => trigger('input'));
}, true);
"""


def title(about: str) -> str:
    return f"<h1>A sentence, a step, a picture</h1><p>{escape(about)}</p>"


def seconds(value: float) -> str:
    """Return a time formatted with about two significant digits, such as 78 ms or 1.9 s."""
    return f"{1000 * value:.0f} ms" if value < 0.995 else f"{value:.1f} s"


def own_caption(
    drawing: Drawing | None, name: str = "One step", says: str = "type, and it is drawn", prompt: str = ""
) -> str:
    """Return the caption with the model's generation time. The prompt is its tooltip."""
    if drawing is None:
        return _caption(name, "", says)
    steps = "One step" if drawing.steps == 1 else f"{drawing.steps} steps"
    return _caption(steps, f'<span class="time fast">{seconds(drawing.seconds)}</span>', "", prompt)


def comparison_caption(beside: Comparison, drawing: Drawing | None = None, own_seconds: float = 0.0) -> str:
    """Return the caption of the comparison: its name, a progress bar while it runs, and its relative duration."""
    name = f"{beside.name}, {beside.steps} steps"
    if drawing is None:
        return _caption(name, "", "Enter draws it, too") + _bar(0)
    time = f'<span class="time">{seconds(drawing.seconds)}</span>'
    if not drawing.done:
        return _caption(name, time, f"step {drawing.step}") + _bar(drawing.step / drawing.steps)
    times = f"{drawing.seconds / own_seconds:.0f}× as long" if own_seconds else ""
    return _caption(name, time, times) + _bar(0)


def remark(*parts: str) -> str:
    return f'<div class="remark">{" ".join(escape(part) for part in parts if part)}</div>'


def _bar(share: float) -> str:
    return f'<div class="bar"><div style="width: {100 * share:.0f}%"></div></div>'


def _caption(name: str, time: str, says: str, tip: str = "") -> str:
    title = f' title="{escape(tip)}"' if tip else ""
    return f'<div class="caption"{title}><b>{escape(name)}</b>{time}<span class="says">{escape(says)}</span></div>'
