"""Measure how long a user of `rectified-diffusers demo` waits for the first image and for each later one.

    python benchmarks/demo.py

The command starts in a new process, as for a user. The page opens in a headless Chromium that is already running.
Times are medians: over --rounds new processes for events that happen once per process, and over all changes in all
processes (--changes per round) for the rest. The time of a change is measured in the page, from the browser's input
event until the new image is decoded and its frame is painted; it excludes Playwright's own messages. The browser, the
page's server and the model share the machine's cores.

The kinds of change are: one more key; a text filled in at once; a text pasted from the clipboard; another seed; and
the last key of a word that is typed with --key-milliseconds between keys, while the model is still working on an
earlier key.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Playwright, sync_playwright

from machine import median, provenance, write_results

COMMAND = [sys.executable, "-m", "rectified_diffusers.cli", "demo", "--port", "0", "--device", "cpu"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIRST, NEXT = 10.0, 0.3  # seconds, the targets of the project
GIVE_UP = 120_000  # milliseconds
TYPED = " at night"
THINGS = ("apple", "rocket", "fish", "cake", "heart", "tree", "pizza", "ghost", "mushroom", "umbrella")
COLOURS = ("red", "blue", "green", "yellow", "pink", "white", "black", "orange", "brown", "purple", "grey", "golden")

# Resolves to the milliseconds from the last input event until the image of `caption` is on the screen.
WATCH = """
(caption) => {
  let asked = performance.now();
  const note = () => { asked = performance.now(); };
  document.addEventListener('input', note, true);
  const wished = () => document.querySelector('#own-caption .caption')?.title === caption;
  const before = document.querySelector('#picture img')?.src;
  window.shown = new Promise((resolve) => {
    const look = async () => {
      const picture = document.querySelector('#picture img');
      if (!picture || picture.src === before || !wished()) return;
      watcher.disconnect();
      document.removeEventListener('input', note, true);
      await picture.decode();
      requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - asked)));
    };
    const watcher = new MutationObserver(look);
    watcher.observe(document.body, {subtree: true, childList: true, attributes: true});
  });
}
"""
FIRST_SHOWN = (
    "() => { const p = document.querySelector('#picture img'); return p && p.complete && p.naturalWidth > 0; }"
)

Prompts = Iterator[str]


def new_prompts() -> Prompts:
    """Yield distinct prompts, none equal to the page's initial "a red apple", so that every image on screen is new."""
    number = 1
    while True:
        yield f"a {COLOURS[number % 12]} {THINGS[number // 12 % 10]}" + f" {number // 120}" * (number >= 120)
        number += 1


@contextmanager
def served(threads: int, words: list[str]) -> Iterator[tuple[str, float]]:
    """Start the command; yield the page's address and the start time."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the command ended without an address; its error is above")
            yield line.split()[0], begin
        finally:
            process.terminate()


def changed(page: Page, caption: str, change: Callable[[], None]) -> float:
    """Make a change and return the seconds until its image is shown."""
    page.evaluate(WATCH, caption)
    change()
    milliseconds = page.evaluate(f"Promise.race([window.shown, new Promise(r => setTimeout(r, {GIVE_UP}, null))])")
    if milliseconds is None:
        raise SystemExit(f"no picture of {caption!r} within {GIVE_UP / 1000:.0f} s")
    return milliseconds / 1000


def changes(page: Page, prompts: Prompts, args: argparse.Namespace) -> dict[str, list[float]]:
    """Make every kind of change in turn."""
    text = page.locator("#prompt textarea")
    seed = page.locator("#seed input")
    times: dict[str, list[float]] = {name: [] for name in ("one key", "filled", "pasted", "seed", "typed word")}
    for number in range(args.changes):
        prompt = next(prompts)
        times["filled"].append(changed(page, prompt, lambda prompt=prompt: text.fill(prompt)))
        times["one key"].append(changed(page, f"{prompt}s", lambda: text.press("s")))
        times["seed"].append(changed(page, f"{prompt}s", lambda number=number: seed.fill(str(number + 1))))
        prompt = next(prompts)
        page.evaluate("text => navigator.clipboard.writeText(text)", prompt)
        text.select_text()
        times["pasted"].append(changed(page, prompt, lambda: text.press("ControlOrMeta+v")))
        times["typed word"].append(
            changed(page, prompt + TYPED, lambda: text.press_sequentially(TYPED, delay=args.key_milliseconds))
        )
    return times


def measure_once(tools: Playwright, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, list[float]]]:
    installed = CHROMIUM or tools.chromium.executable_path
    browser = tools.chromium.launch(executable_path=installed, args=["--no-sandbox"])
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(GIVE_UP)
    with served(args.threads, args.more) as (url, begin):
        once = {"the command says the address": time.perf_counter() - begin}
        page.goto(url)
        once["the page is loaded"] = time.perf_counter() - begin
        page.wait_for_function(FIRST_SHOWN)
        once["the first picture is shown"] = time.perf_counter() - begin
        page.wait_for_timeout(500)
        times = changes(page, new_prompts(), args)
        browser.close()
    return once, times


def measure(args: argparse.Namespace) -> dict[str, Any]:
    once: list[dict[str, float]] = []
    times: dict[str, list[float]] = {}
    with sync_playwright() as tools:
        for _ in range(args.rounds):
            start, more = measure_once(tools, args)
            once.append(start)
            for name, values in more.items():
                times.setdefault(name, []).extend(values)
            print(
                start, {name: round(median(values), 3) for name, values in more.items()}, file=sys.stderr, flush=True
            )
    return {"start": once, "changes": times}


def as_markdown(results: dict[str, Any]) -> list[str]:
    """Return the lines of the report, without its provenance."""
    lines = ["# The demo, as its visitor waits for it", ""]
    lines += [f"| from the command until (median of {len(results['start'])}) | seconds | target |", "|---|---|---|"]
    for name in results["start"][0]:
        target = FIRST if "picture" in name else ""
        lines.append(f"| {name} | {median([each[name] for each in results['start']]):.2f} | {target} |")
    lines += [
        "",
        "| from a change until its picture is shown | median | slowest | of | target |",
        "|---|---|---|---|---|",
    ]
    for name, times in results["changes"].items():
        lines.append(f"| {name} | {median(times):.3f} | {max(times):.3f} | {len(times)} | {NEXT} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="new processes of the command")
    parser.add_argument("--changes", type=int, default=20, help="changes of each kind per round")
    parser.add_argument("--key-milliseconds", type=int, default=100, help="time between the keys of a typed word")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo"), help="without suffix")
    parser.add_argument("more", nargs="*", help="further options of the command, after --")
    args = parser.parse_args()
    results = {"provenance": provenance() | {"threads": str(args.threads)}, **measure(args)}
    write_results(args.output, results, as_markdown(results))


if __name__ == "__main__":
    main()
