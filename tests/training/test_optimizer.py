"""The optimizers: AdamW and its 8-bit form, and their state in a checkpoint."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rectified_diffusers.data.dataset import TripletDataset
from rectified_diffusers.training.trained import load_optimizer_tensors, optimizer_tensors
from tests.training.helpers import digests, make_trainer


class AdamW8bit(torch.optim.Optimizer):
    """As much of bitsandbytes' optimizer as matters here: what it keeps of a parameter, and in which types.

    It counts steps in whole numbers, and its `state_dict` has the quantised moments in a dictionary of their own.
    """

    NESTED = "__bnb_optimizer_quant_state__"

    def __init__(self, parameters: Any, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state |= {"step": 0, "state1": torch.zeros_like(weight, dtype=torch.uint8)}
                assert type(state["step"]) is int
                state["step"] += 1
                state["state1"] += 1
                weight -= group["lr"] * weight.grad.sign() / state["step"]

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        for i, entries in found["state"].items():
            entries = dict(entries)
            found["state"][i] = {"step": entries.pop("step"), self.NESTED: entries}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = {i: {"step": kept["step"], **kept[self.NESTED]} for i, kept in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})
        for entries in self.state.values():  # torch gives them the dtype of the weights
            entries["state1"] = entries["state1"].to(torch.uint8)


@pytest.fixture(params=["real", "stand-in"])
def bitsandbytes(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "real":
        pytest.importorskip("bitsandbytes")
    else:
        package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
        optim.AdamW8bit = AdamW8bit  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)


@pytest.mark.usefixtures("bitsandbytes")
def test_8_bits_resume_bit_for_bit(dataset: TripletDataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": "adamw8bit", "keep_checkpoints": 1}
    trainer = make_trainer("reflow", dataset, tmp_path / "whole", max_steps=3, **options)
    trainer.train()
    moments = {tensor.dtype for name, tensor in trainer.tensors()["optimizer.safetensors"].items() if "state1" in name}
    assert torch.uint8 in moments
    make_trainer("reflow", dataset, tmp_path / "parts", max_steps=2, **options).train()
    make_trainer("reflow", dataset, tmp_path / "parts", max_steps=3, **options).train()
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")


def test_missing_bitsandbytes_says_how_to_install_it(
    dataset: TripletDataset, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'optimizer="adamw8bit" needs bitsandbytes: pip install'):
        make_trainer("reflow", dataset, output_dir, optimizer="adamw8bit")


def test_the_state_of_adamw_comes_back(dataset: TripletDataset, tmp_path: Path) -> None:
    first, second = (make_trainer("reflow", dataset, tmp_path) for _ in range(2))
    first.train_step(1)
    names = first.student.names
    found = optimizer_tensors(names, first.student.optimizer.optimizer)
    assert {name.rpartition(".")[2] for name in found} == {"step", "exp_avg", "exp_avg_sq"}
    load_optimizer_tensors(names, second.student.optimizer.optimizer, found)
    again = optimizer_tensors(names, second.student.optimizer.optimizer)
    assert found.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in found.items())
