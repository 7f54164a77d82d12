"""examples/controlnet.py with the real controlnet_aux: canny runs, detectors with weights load them from a Hub."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hub.client import start_client
from tests.hub.server import Repository, read_files, the_hub
from tests.tiny import make_tiny_controlnet, make_tiny_pipeline

EXAMPLE = Path(__file__).parent.parent / "examples" / "controlnet.py"
MODEL = "somebody/tiny-one-step"
SOFTEDGE = "lllyasviel/control_v11p_sd15_softedge"
ANNOTATORS = "lllyasviel/Annotators"


def load_example():
    spec = importlib.util.spec_from_file_location("controlnet_example", EXAMPLE)
    assert spec
    assert spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a tiny model and a tiny ControlNet for it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    pipeline = make_tiny_pipeline("flow")
    pipeline.save_pretrained(folder / "model")
    make_tiny_controlnet(pipeline.unet).save_pretrained(folder / "controlnet")
    return folder


def square(size: int, corner: int = 16) -> Image.Image:
    """A black square, from `corner` to `size - corner`, on white."""
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    pixels[corner : size - corner, corner : size - corner] = 0
    return Image.fromarray(pixels)


def test_canny_finds_the_outline_of_a_square():
    detector = load_example().load_detector("canny")
    edges = np.asarray(detector(square(64), detect_resolution=64, image_resolution=64))
    rows, columns = (edges[..., 0] > 127).nonzero()
    assert edges.shape == (64, 64, 3)
    for ends in (rows, columns):
        assert 14 <= ends.min() <= 17
        assert 46 <= ends.max() <= 49
    assert not edges[20:44, 20:44].any()  # the outline, not the area


def test_the_example_draws_along_canny_edges(checkpoints, tmp_path, monkeypatch):
    model, controlnet = str(checkpoints / "model"), str(checkpoints / "controlnet")
    pictures = []
    for corner in (8, 24):
        square(64, corner).save(tmp_path / "given.png")
        output = tmp_path / f"{corner}.png"
        options = ["--model", model, "--controlnet", controlnet, "--resolution", "64", "--output", str(output)]
        monkeypatch.setattr("sys.argv", ["controlnet.py", str(tmp_path / "given.png"), "a red apple", *options])
        load_example().main()
        pictures.append(np.asarray(Image.open(output)))
        control = np.asarray(Image.open(tmp_path / f"{corner}.control.png"))
        assert control.shape == pictures[-1].shape == (64, 64, 3)
        assert control.any()
    assert (pictures[0] != pictures[1]).any()  # same prompt, same noise: only the edges differ


def run_example(arguments: list[str]) -> None:
    """Run the example as a program; for the tests' client of the Hub, another process."""
    sys.argv = ["controlnet.py", *arguments]
    load_example().main()


@pytest.mark.slow
def test_a_detector_with_weights_and_the_models_load_from_the_hub(checkpoints, tmp_path):
    from controlnet_aux.pidi.model import pidinet

    weights = io.BytesIO()
    torch.save({"state_dict": pidinet().state_dict()}, weights)
    hub = the_hub()
    hub.repositories |= {MODEL: Repository(), SOFTEDGE: Repository(), ANNOTATORS: Repository()}
    hub.repositories[MODEL].commit(read_files(checkpoints / "model"))
    hub.repositories[SOFTEDGE].commit(read_files(checkpoints / "controlnet"))
    hub.repositories[ANNOTATORS].commit({"table5_pidinet.pth": weights.getvalue()})
    given, drawn = tmp_path / "given.png", tmp_path / "drawn.png"
    square(64).save(given)
    arguments = ["--model", MODEL, "--detector", "softedge", "--resolution", "64", "--output", str(drawn)]
    with start_client(with_us=True) as client:
        client.call(run_example, [str(given), "a red apple", *arguments])
    assert Image.open(drawn).size == (64, 64)
    asked = [path.removesuffix("table5_pidinet.pth") for _, path in hub.requests]
    assert f"/{ANNOTATORS}/resolve/main/" in asked
    assert any(path.startswith(f"/{SOFTEDGE}/resolve/") for path in asked)


@pytest.mark.parametrize(
    ("name", "module", "networks"),
    [
        ("depth", "midas", {"MiDaSInference": "dpt_hybrid-midas-501f0c75.pt"}),
        (
            "openpose",
            "open_pose",
            {"Body": "body_pose_model.pth", "Hand": "hand_pose_model.pth", "Face": "facenet.pth"},
        ),
    ],
)
def test_the_large_detectors_ask_the_hub_for_their_weights(name, module, networks, monkeypatch):
    """Their networks have 100 million parameters: neither files nor networks are real here, the calls are."""
    asked = []

    def hf_hub_download(repo, filename, **kwargs):
        asked.append((repo, filename))
        return filename

    monkeypatch.setattr(f"controlnet_aux.{module}.hf_hub_download", hf_hub_download)
    for network in networks:
        monkeypatch.setattr(f"controlnet_aux.{module}.{network}", lambda *args, **kwargs: None)
    load_example().load_detector(name)
    assert asked == [(ANNOTATORS, file) for file in networks.values()]


def test_an_unknown_detector_lists_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["controlnet.py", "given.png", "a", "--detector", "edges", "--output", "a.png"])
    with pytest.raises(SystemExit):
        load_example().main()
    assert "choose from" in (message := capsys.readouterr().err)
    assert all(name in message for name in ("canny", "depth", "openpose", "softedge"))


@pytest.mark.parametrize("source", [None, "raise AttributeError('module mediapipe has no attribute solutions')"])
def test_a_controlnet_aux_that_cannot_be_imported_is_explained(source, tmp_path, monkeypatch):
    if source is None:
        monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    else:
        (tmp_path / "controlnet_aux.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "controlnet_aux", raising=False)
    with pytest.raises(RuntimeError, match=r"rectified_diffusers\[controlnet\].*pip uninstall mediapipe"):
        load_example().load_detector("canny")
