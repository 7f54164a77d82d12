"""The Space of examples/space in a real Chromium, on a computer and on a phone, with a camera that Chromium makes up.

With the environment variable WRITE_SCREENSHOTS=1, the screenshots of the phone replace those in docs/images.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.test_demo_browser import IMAGES, WAIT, chromium, playwright, shown, wait_for_another

pytestmark = pytest.mark.slow
SPACE = Path(__file__).parents[1] / "examples" / "space"
PORT = 7869
SCREENS = {"computer": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def url():
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PORT": str(PORT), "SPACE_HOST": "me-space.hf.space"}
    command = [sys.executable, str(SPACE / "app.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert str(PORT) in process.stdout.readline()
        yield f"http://127.0.0.1:{PORT}"
        process.terminate()


@pytest.fixture(scope="module")
def browser():
    with chromium("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as browser:
        yield browser


@pytest.fixture(scope="module", params=SCREENS)
def page(request, browser, url):
    width, height = SCREENS[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(WAIT)
    page.broken, page.name = [], request.param
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#picture img")
    yield page
    assert page.broken == []
    page.close()


@pytest.fixture
def images(page, tmp_path):
    return IMAGES if os.environ.get("WRITE_SCREENSHOTS") and page.name == "phone" else tmp_path


def screenshot(page, folder, tab):
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # for the colors of the transition
    page.screenshot(path=folder / f"space-{tab}-{page.name}.png")
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    cut = "[...document.querySelectorAll('.caption')].filter((x) => x.scrollHeight > x.clientHeight).length"
    assert page.evaluate(cut) == 0


def test_few_steps_stand_beside_the_comparison(page, images):
    page.get_by_role("tab", name="Steps").click()
    page.click("#few-steps")
    playwright.expect(page.locator("#few-3-caption")).to_contain_text("× as long", timeout=WAIT)
    assert len({shown(page, f"few-{slot}") for slot in range(4)}) == 4
    for name in ("One step", "2 steps", "4 steps", "The same model, 8 steps"):
        assert page.get_by_role("img", name=f"a red apple ({name})", exact=True).is_visible()
    screenshot(page, images, "steps")


def test_the_image_follows_a_photo(page, images, tmp_path):
    photo = Image.new("RGB", (300, 240), "white")
    pen = ImageDraw.Draw(photo)
    pen.ellipse((70, 40, 230, 200), fill=(240, 120, 20))
    pen.rectangle((142, 20, 158, 60), fill="green")
    photo.save(tmp_path / "orange.png")
    page.get_by_role("tab", name="Photo").click()
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "orange.png")
    page.wait_for_selector("#photo-picture img")
    before = shown(page, "photo-picture")
    page.locator("#change input[type=number]").fill("0.8")
    before = wait_for_another(page, before, "photo-picture")
    page.locator("#prompt textarea").fill("sun")
    wait_for_another(page, before, "photo-picture")
    screenshot(page, images, "photo")
    assert page.locator("#photo-picture").bounding_box()["y"] < page.viewport_size["height"]


def test_the_image_follows_the_camera_until_it_is_stopped(page):
    page.get_by_role("tab", name="Photo").click()
    before = (
        page.locator("#photo-picture img").get_attribute("src") if page.locator("#photo-picture img").count() else ""
    )
    page.get_by_role("button", name="Camera").click()
    for _ in range(3):
        before = wait_for_another(page, before, "photo-picture")
    page.get_by_role("tab", name="Steps").click()
    page.wait_for_timeout(1000)
    page.get_by_role("tab", name="Photo").click()
    assert page.get_by_role("button", name="Camera").is_visible()  # not Stop


def test_a_file_that_is_no_image_is_refused(page, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    page.get_by_role("tab", name="Photo").click()
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "text.png")
    playwright.expect(page.locator("#photo [role=status]")).to_contain_text("not an image", timeout=WAIT)


def test_the_options_of_a_space_are_its_variables():
    app = runpy.run_path(str(SPACE / "app.py"))
    environment = {"SPACE_HOST": "me-space.hf.space", "MODEL": "me/one", "TEACHER": ""}
    served = app["arguments"](["--dtype", "float16"], environment)
    assert served[:5] == ["demo", "--host", "0.0.0.0", "--port", "7860"]
    assert served[5:] == ["--allow-host", "me-space.hf.space", "--model", "me/one", "--dtype", "float16"]
