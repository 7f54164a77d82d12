"""examples/emoji/decoder.py in small: the decoder is trained, the encoder and the latents' scale are as before."""

import torch
from diffusers import AutoencoderKL

from tests import emoji
from tests.emoji import write_data
from tests.tiny import make_components


class Distance(torch.nn.Module):
    """In place of LPIPS, whose weights are no part of the tests: the mean difference of two images' colors."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self.scale * (first - second).mean(dim=(1, 2, 3)).abs()


def test_only_the_decoder_is_trained(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "rectified_diffusers.training.losses.load_lpips", lambda *which: asked.append(which) or Distance()
    )
    vae = make_components()["vae"]
    vae.register_to_config(scaling_factor=0.75)
    vae.save_pretrained(tmp_path / "vae")
    write_data(tmp_path / "data")
    folders = [text for name in ("data", "weights", "vae", "output") for text in (f"--{name}", str(tmp_path / name))]
    small = ["--batch-size", "2", "--ema-decay", "0", "--warmup-steps", "0", "--decay-steps", "0"]
    with emoji.example("decoder.py", monkeypatch) as example:
        example(*folders, *small, "--max-steps", "2")
    assert asked == [("vgg", tmp_path / "weights" / "lpips_vgg16.safetensors")]
    before = AutoencoderKL.from_pretrained(tmp_path / "vae")
    after = AutoencoderKL.from_pretrained(tmp_path / "output")
    assert after.config.scaling_factor == 0.75
    trained = after.state_dict()
    kept = {name for name, tensor in before.state_dict().items() if torch.equal(tensor, trained[name])}
    parts = {name: name.split(".")[0] for name in trained}
    assert {parts[name] for name in kept} == {"encoder", "quant_conv"}
    assert {parts[name] for name in trained.keys() - kept} == {"decoder", "post_quant_conv"}
    assert not any(parts[name] in ("encoder", "quant_conv") for name in trained.keys() - kept)
    assert (tmp_path / "output" / "reconstructions.png").exists()
