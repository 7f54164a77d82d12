"""The switches by kind of CPU: the table against its measurement, and the measurement of a single machine."""

import json
import time
from pathlib import Path

import pytest
import torch

from rectified_diffusers import optimize, tune
from rectified_diffusers.speed import cpu, packing
from rectified_diffusers.speed.cpu import SWITCHES, cpu_kind
from rectified_diffusers.speed.precision import fast_dtype
from tests.marks import slow_but
from tests.tiny import make_tiny_pipeline, make_tiny_xl_pipeline

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu_switches.json"


def as_kind(monkeypatch, kind: str) -> None:
    """Make PyTorch say that this CPU is of a kind."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: kind == "amx", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: kind != "other", raising=False)


@pytest.mark.parametrize("kind", SWITCHES)
def test_auto_follows_the_kind_of_cpu(monkeypatch, kind):
    as_kind(monkeypatch, kind)
    assert cpu_kind() == kind
    assert fast_dtype(torch.device("cpu")) == SWITCHES[kind]["dtype"]
    with optimize(make_tiny_pipeline()) as fast:
        assert {name: fast.switches[name] for name in SWITCHES[kind]} == SWITCHES[kind]


def test_blockwise_attention_is_for_bfloat16_without_amx(monkeypatch):
    as_kind(monkeypatch, "avx512_bf16")
    with optimize(make_tiny_pipeline(), dtype=None) as fast:
        assert not fast.switches["blockwise_attention"]
    as_kind(monkeypatch, "amx")
    with optimize(make_tiny_pipeline(), blockwise_attention=True) as fast:
        assert fast.switches["blockwise_attention"]


def test_a_cpu_whose_instructions_torch_does_not_report_is_of_the_other_kind(monkeypatch):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert cpu_kind() == "other"


def test_no_measured_switch_of_the_table_loses():
    kinds = json.loads(RESULTS.read_text(encoding="utf-8"))["kinds"]
    assert kinds
    for kind, results in kinds.items():
        assert not any(results["summary"]["pays"].values()), kind
        names = {name.partition("=")[0] for name in results["summary"]["pays"]}
        assert names >= set(SWITCHES[kind]), "not measured yet as a switch of its own"


def test_the_page_has_the_measured_cost_of_each_switch():
    """A switch that is on in 16 bits only is measured together with bfloat16."""
    content = json.loads((ROOT / "benchmarks" / "results" / "speed_price.json").read_text(encoding="utf-8"))
    rows = {row["switch"].removeprefix("bfloat16, "): row for row in content["rows"]}
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    rows["dtype"] = rows["bfloat16"]
    costs = {cells[1].strip(" `"): cells[-2] for line in page.splitlines() if len(cells := line.split("|")) == 7}
    inexact = ("dtype", "channels_last", "blockwise_attention", "fold_upsampling", "pack_weights")
    for name in inexact:
        assert f"largest {rows[name]['largest']}" in costs[name]
        assert "mean" not in costs[name] or f"mean {rows[name]['mean']:.1f}" in costs[name]
    assert all(rows[name]["largest"] == 0 for name in ("keep_memory", "cache_prompts", "cache_times"))
    assert f"of `auto` {rows['auto']['largest']}, are" in page
    assert f"the mean of\n`auto` is {rows['auto']['mean']:.1f}" in page


@pytest.mark.parametrize("make", slow_but([make_tiny_pipeline], [make_tiny_pipeline, make_tiny_xl_pipeline]))
def test_tune_returns_arguments_of_optimize(make):
    pipeline = make()
    chosen = tune(pipeline, height=32, width=48)
    assert set(chosen) == set(SWITCHES["other"])
    with optimize(pipeline, **chosen) as fast:
        assert {name: fast.switches[name] for name in chosen} == chosen
        pipeline("a red apple", num_inference_steps=1, height=32, width=48)


@pytest.mark.parametrize("slow", ["blockwise_attention", "fold_upsampling", "pack_weights"])
def test_tune_leaves_off_what_is_slower_here(monkeypatch, slow):
    def wait(stock):
        def call(*args, **options):
            time.sleep(0.2)
            return stock(*args, **options)

        return call

    if slow == "blockwise_attention":
        monkeypatch.setattr(cpu, "attention", wait(cpu.attention))
    elif slow == "pack_weights":
        monkeypatch.setattr(packing.Packing, "__call__", wait(packing.Packing.__call__))
    else:
        monkeypatch.setattr(torch.nn.functional, "conv_transpose2d", wait(torch.nn.functional.conv_transpose2d))
    assert not tune(make_tiny_pipeline())[slow]


def test_tune_times_the_largest_layers():
    layers = cpu._LargestLayers()
    with torch.no_grad(), layers:
        cpu._call_on_meta(make_tiny_pipeline().unet, [24, 8])
    assert layers.attention[0][2] == 12 * 4, "attention begins at the second level"
    assert layers.upsampling[2:] == (12, 4)
    assert layers.convolution[0][2:] == (24, 8)
    assert layers.linear[0][0] == 12 * 4
    assert layers.linear[1][0] > layers.linear[1][1], "the first layer of a feed-forward network is the largest"


def test_tune_refuses_another_device():
    pipeline = make_tiny_pipeline()
    pipeline.unet.to("meta")
    with pytest.raises(ValueError, match="tune measures CPUs, got a pipeline on meta"):
        tune(pipeline)
