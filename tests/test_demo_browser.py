"""The demo in a real Chromium, as a visitor uses it, and its screenshots.

The page is served by the command itself with the bundled model. With the environment variable WRITE_SCREENSHOTS=1, the
screenshots replace those in docs/images. The accessibility checker is axe-core, which npm fetches where it can.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytest.importorskip("gradio", reason='no gradio: pip install "rectified_diffusers[demo]"')

IMAGES = Path(__file__).parents[1] / "docs" / "images"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE, WIDTHS = "axe-core@4.14.1", (360, 390, 768, 1280)
WAIT = 120_000  # milliseconds: a test waits for what it asserts, and gives up late


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """Return a weight delta of the bundled model: its own weights, turned down a little."""
    from safetensors.torch import load_file, save_file

    from rectified_diffusers import bundled_checkpoint

    weights = load_file(bundled_checkpoint() / "unet" / "diffusion_pytorch_model.safetensors")
    file = tmp_path_factory.mktemp("styles") / "shifted.safetensors"
    save_file({key: 0.05 * x.float().roll(1, 0) for key, x in weights.items()}, file)
    return file


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory):
    import torch
    from diffusers import ControlNetModel

    from rectified_diffusers import RectifiedFlowPipeline, bundled_checkpoint

    unet = RectifiedFlowPipeline.from_pretrained(bundled_checkpoint()).unet
    torch.manual_seed(0)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96))
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if not weight.any()):
            weight.normal_(std=0.02)
    folder = tmp_path_factory.mktemp("controlnet")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(controlnet):
    """Start the command on a free port and return its address."""
    command = [sys.executable, "-m", "rectified_diffusers.cli", "demo", "--port", "0", "--controlnet", str(controlnet)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield line.split()[0]
        process.terminate()


@contextmanager
def chromium(*arguments):
    """Start a Chromium, or skip the test where none is installed."""
    with playwright.sync_playwright() as tools:
        installed = CHROMIUM or tools.chromium.executable_path
        if not Path(installed).exists():
            pytest.skip("no Chromium: install the package chromium, or run playwright install chromium")
        browser = tools.chromium.launch(executable_path=installed, args=["--no-sandbox", *arguments])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """Return the source of the accessibility checker."""
    folder = tmp_path_factory.mktemp("axe")
    if (
        not (npm := shutil.which("npm"))
        or subprocess.run([npm, "pack", AXE], cwd=folder, capture_output=True).returncode
    ):
        pytest.skip(f"no {AXE}: needs npm and its registry")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()


@pytest.fixture
def images(tmp_path):
    return IMAGES if os.environ.get("WRITE_SCREENSHOTS") else tmp_path


@pytest.fixture
def screen():
    return 1280, "light"


@pytest.fixture
def page(browser, url, screen):
    width, scheme = screen
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.broken, page.hosts = [], set()
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.on("response", lambda answer: page.broken.append(answer.url) if answer.status >= 400 else None)
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
    page.goto(url)
    page.wait_for_selector("#picture img")
    yield page
    assert page.broken == []
    assert page.hosts == {url.split("/")[2]}  # nothing is fetched from the net
    context.close()


def shown(page, name="picture"):
    return page.locator(f"#{name} img").get_attribute("src")


def wait_for_another(page, before, name="picture"):
    picture = page.locator(f"#{name} img")
    playwright.expect(picture).not_to_have_attribute("src", before or "", timeout=WAIT)
    return picture.get_attribute("src")


def ask(page, prompt):
    """Write a prompt and press Enter; wait until its own picture and the one beside it are drawn."""
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#prompt textarea").press("Enter")
    wait_for_caption(page, "own-caption", prompt)
    playwright.expect(page.locator("#beside-caption")).to_contain_text("× as long", timeout=WAIT)


def wait_for_caption(page, name, prompt):
    page.wait_for_selector(f'#{name} .caption[title="{prompt}"]')


def test_the_picture_follows_the_typing(page):
    before = shown(page)
    page.locator("#prompt textarea").fill("")
    page.locator("#prompt textarea").press_sequentially("rocket", delay=50)
    wait_for_caption(page, "own-caption", "rocket")
    wait_for_another(page, before)
    playwright.expect(page.locator("#own-caption")).to_contain_text("One step")


def test_the_picture_follows_a_paste_a_cut_and_a_deletion(page):
    text = page.locator("#prompt textarea")
    text.select_text()
    text.press("ControlOrMeta+x")
    playwright.expect(page.locator("#own-caption")).to_contain_text("type to generate an image", timeout=WAIT)
    before = shown(page)
    text.fill("a blue heart")
    wait_for_caption(page, "own-caption", "a blue heart")
    before = wait_for_another(page, before)
    text.press("End")
    text.press("ControlOrMeta+v")
    wait_for_caption(page, "own-caption", "a blue hearta red apple")
    before = wait_for_another(page, before)
    text.press("Backspace")
    wait_for_caption(page, "own-caption", "a blue hearta red appl")
    wait_for_another(page, before)


def test_the_picture_follows_seed_and_sliders(page):
    before = shown(page)
    page.locator("#seed input").fill("7")
    before = wait_for_another(page, before)
    page.locator("#steps input[type=number]").fill("3")
    before = wait_for_another(page, before)
    playwright.expect(page.locator("#own-caption")).to_contain_text("3 steps", timeout=WAIT)
    slider = page.locator("#steps input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    wait_for_another(page, before)
    playwright.expect(page.locator("#own-caption")).to_contain_text("4 steps", timeout=WAIT)


def test_enter_right_after_the_last_key_keeps_the_comparison(page):
    page.locator("#prompt textarea").fill("")
    page.locator("#prompt textarea").press_sequentially("cat face")
    page.locator("#prompt textarea").press("Enter")
    wait_for_caption(page, "own-caption", "cat face")
    playwright.expect(page.locator("#beside-caption")).to_contain_text("× as long", timeout=WAIT)
    page.wait_for_timeout(1000)  # for a live picture that should not come
    playwright.expect(page.locator("#beside-caption")).to_contain_text("× as long")


def test_enter_draws_beside_and_into_the_history(page):
    ask(page, "a red heart")
    assert shown(page, "beside")
    own = shown(page)
    ask(page, "sun")
    playwright.expect(page.locator("#history img")).to_have_count(3, timeout=WAIT)  # with the first of the page
    page.locator("#history button").nth(1).click()
    wait_for_caption(page, "own-caption", "a red heart")
    playwright.expect(page.locator("#prompt textarea")).to_have_value("a red heart", timeout=WAIT)
    playwright.expect(page.locator("#picture img")).to_have_attribute("src", own, timeout=WAIT)


def test_stop_ends_the_comparison(page):
    page.locator("#prompt textarea").fill("ghost")
    page.locator("#prompt textarea").press("Enter")
    playwright.expect(page.locator("#beside-caption")).to_contain_text("step", timeout=WAIT)
    page.click("#stop")
    page.click("#new-seed")  # the model is free for it
    playwright.expect(page.locator("#beside-caption")).to_contain_text("× as long", timeout=WAIT)


def test_a_reload_brings_the_last_picture_and_the_history_back(page):
    ask(page, "mushroom")
    own, count = shown(page), page.locator("#history img").count()
    page.reload()
    wait_for_caption(page, "own-caption", "mushroom")
    playwright.expect(page.locator("#picture img")).to_have_attribute("src", own, timeout=WAIT)
    playwright.expect(page.locator("#history img")).to_have_count(count, timeout=WAIT)


def test_the_picture_can_be_downloaded_with_its_prompt(page):
    from PIL import Image

    with page.expect_download() as download:
        page.locator("#picture button[aria-label='Download'], #picture a[download]").first.click()
    picture = Image.open(download.value.path())
    assert picture.format == "PNG"
    assert '"prompt": "a red apple"' in picture.info["rectified_diffusers"]


def test_a_style_is_uploaded_and_worn(page, style):
    before = shown(page)
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(style)
    slider = page.locator("#styles").get_by_label(re.compile("shifted")).first
    slider.wait_for()
    page.locator("#styles input[type=number]").first.fill("0.8")
    wait_for_another(page, before)


def test_a_file_that_is_no_style_is_refused_on_the_page(page, tmp_path):
    file = tmp_path / "torn.safetensors"
    file.write_bytes(b"nonsense")
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(file)
    page.get_by_text("not a complete safetensors file").wait_for()


def test_a_sketch_is_drawn_along(page):
    page.get_by_role("tab", name="Sketch").click()
    draw_house(page)
    page.wait_for_selector("#sketch-picture img")
    before = shown(page, "sketch-picture")
    page.get_by_role("button", name="Undo").click()
    before = wait_for_another(page, before, "sketch-picture")
    page.get_by_label("Strength of the sketch").first.fill("0")
    before = wait_for_another(page, before, "sketch-picture")
    page.locator("#prompt textarea").fill("rocket")
    wait_for_another(page, before, "sketch-picture")


def draw_house(page):
    box = page.locator("#sketch canvas").bounding_box()
    for line in (((0.2, 0.5), (0.5, 0.2), (0.8, 0.5)), ((0.25, 0.5), (0.25, 0.8), (0.75, 0.8), (0.75, 0.5))):
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in line]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=8)
        page.mouse.up()


def test_an_animation_is_drawn_and_can_be_stopped(page, images):
    page.get_by_role("tab", name="Morph").click()
    page.get_by_label("Frames").first.fill("4")
    page.click("#animate")
    playwright.expect(page.locator("#morph-caption")).to_contain_text("8 frames", timeout=WAIT)
    assert shown(page, "morph-picture").endswith(".gif")
    page.screenshot(path=images / "demo-morph.png")
    page.get_by_label("Frames").first.fill("60")
    page.click("#animate")
    playwright.expect(page.locator("#morph-caption")).to_contain_text("of 120", timeout=WAIT)
    page.click("#stop")
    page.get_by_role("tab", name="Generate").click()
    page.locator("#prompt textarea").press_sequentially("!", delay=50)
    wait_for_caption(page, "own-caption", "a red apple!")


@pytest.mark.parametrize("screen", [(width, scheme) for width in WIDTHS for scheme in ("light", "dark")])
def test_every_screen_shows_the_page_without_scrolling_sideways(page, screen, images):
    width, scheme = screen
    for prompt in ("sun", "a red heart", "rocket", "tropical fish", "birthday cake", "a red apple, 3d style"):
        ask(page, prompt)
    page.screenshot(path=images / f"demo-{width}-{scheme}.png", full_page=True)
    for tab in ("Sketch", "Morph", "Generate"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        right = "[...document.querySelectorAll('button, input, textarea, canvas, .image, .caption > *')]"
        right += ".filter((x) => x.checkVisibility() && !x.closest('.visually-hidden'))"
        assert page.evaluate(f"Math.max(...{right}.map((x) => x.getBoundingClientRect().right))") <= width
    cut = "[...document.querySelectorAll('.caption')].filter((x) => x.scrollHeight > x.clientHeight).length"
    assert page.evaluate(cut) == 0


@pytest.mark.parametrize("screen", [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")])
def test_the_accessibility_checker_finds_nothing(page, screen, axe):
    ask(page, "a red heart")
    page.evaluate(axe)
    for tab in ("Generate", "Sketch", "Morph"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)  # for the colors of the transition
        found = page.evaluate("axe.run()")
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]] == []
        assert len(found["passes"]) > 20


def test_everything_has_a_name(page):
    ask(page, "a red heart")
    remark = page.locator(".remark", has_text="more steps")
    playwright.expect(remark).to_be_visible()
    playwright.expect(remark).not_to_contain_text("--")  # options are for the terminal
    assert page.get_by_role("textbox", name="Prompt", exact=True).input_value() == "a red heart"
    assert page.get_by_role("img", name="a red heart (One step)", exact=True).count() == 1
    assert page.get_by_role("img", name="a red heart (The same model, 8 steps)", exact=True).count() == 1
    assert page.get_by_role("button", name="a red heart · seed 0", exact=True).count() == 1
    page.get_by_role("tab", name="Sketch").click()
    assert page.get_by_role("img", name="No image yet").is_visible()
    page.get_by_role("tab", name="Morph").click()
    page.get_by_label("Frames").first.fill("2")
    page.click("#animate")
    page.get_by_role("img", name="a red heart → grinning face (4 frames)", exact=True).wait_for()


FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  const name = e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText || e.querySelector('img')?.alt;
  const outlined = style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2;
  return [(name || '').trim(), outlined || e === document.body];
}"""


def tab_stops(page, count):
    """Return the names of the next elements that the Tab key reaches; each has a visible focus."""
    names = []
    for _ in range(count):
        page.keyboard.press("Tab")
        name, is_visible = page.evaluate(FOCUSED)
        assert is_visible, name
        names.append(name)
    return names


def test_the_keyboard_reaches_everything(page):
    ask(page, "a red heart")
    names = tab_stops(page, 26)
    order = [
        "Generate",
        "Surprise me",
        "Stop",
        "Generate",
        "Steps",
        "Photo",
        "Sketch",
        "Morph",
        "Fullscreen",
        "Download",
    ]
    order += ["a red heart (One step)", "Fullscreen", "Download", "a red heart (The same model, 8 steps)"]
    order += ["a red heart · seed 0", "a red apple · seed 0", "Seed", "New seed"]
    assert [name for name in names if name][: len(order)] == order
    rest = " / ".join(names[len(order) :])
    assert all(name in rest for name in ("Steps", "Guidance", "Styles", "Add a LoRA or weight delta"))


def test_a_sketch_is_drawn_with_the_keyboard(page):
    page.get_by_role("tab", name="Sketch").press("Enter")
    page.locator("#sketch canvas").focus()
    for key in ("ArrowLeft", " ", *["ArrowUp"] * 12, *["ArrowRight"] * 12, " "):
        page.keyboard.press(key)
    page.wait_for_selector("#sketch-picture img")
    before = shown(page, "sketch-picture")
    assert tab_stops(page, 1) == ["Undo"]
    page.keyboard.press("Enter")
    page.locator("#sketch canvas").focus()
    for key in (" ", *["ArrowDown"] * 12, " "):
        page.keyboard.press(key)
    wait_for_another(page, before, "sketch-picture")


def test_a_file_is_chosen_with_the_keyboard(page, style):
    # Intercepted from here on: `expect_file_chooser` alone returns before Chromium knows that it is to be.
    page.on("filechooser", lambda _: None)
    page.locator("#upload").focus()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(style)
    page.locator("#styles").get_by_label(re.compile("shifted")).first.wait_for()


def test_a_file_that_is_too_large_is_refused_on_the_page(page, tmp_path):
    file = tmp_path / "large.safetensors"
    with file.open("wb") as opened:
        opened.truncate(300 * 2**20)
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(file)
    page.get_by_text(re.compile("exceed the maximum allowed size")).first.wait_for()
