"""Run diffusers' own test classes on our classes, and on the stock ones beside them.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers
    python -m pip install parameterized torchsde pytest-timeout requests_mock
    python -m tests.diffusers_suite.run --diffusers diffusers

The tests are not part of diffusers' wheel; they are copied out of a checkout, which stays as it is, with `cases/` as
one more folder among them, and judge the *installed* diffusers. The tiny models that they load from the Hub are made
here and put into a cache of their own, so the run is offline. It fails if a test fails on ours and not on the stock
class.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.tiny import make_tokenizer

CASES = Path(__file__).parent / "cases"
TOKENIZER_REPOS = ("hf-internal-testing/tiny-random-clip", "peft-internal-testing/tiny-clip-text-2")
TEXT_MODEL_REPO = "peft-internal-testing/tiny-clip-text-2"
OUTCOMES = ("passed", "failed", "skipped")
Outcomes = dict[str, dict[str, str]]  # class -> test -> one of OUTCOMES


def fill_cache(home: Path) -> None:
    """Write what the tests ask of the Hub into the cache at `home`, in the Hub client's own layout."""
    tokenizer = make_tokenizer()
    for repo in TOKENIZER_REPOS:
        folder = home / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        tokenizer.save_pretrained(snapshot)
        if repo == TEXT_MODEL_REPO:
            text_model().save_pretrained(snapshot)


def text_model() -> CLIPTextModelWithProjection:
    """Make the text encoder of the LoRA tests, 32 channels wide as their U-Nets want it; the weights do not matter."""
    tokens = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_hidden_layers=5,
        num_attention_heads=4,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def run_pytest(checkout: Path, work: Path, names: list[str], arguments: list[str]) -> Outcomes:
    """Copy the tests of the checkout to `work`, add ours, run those of `names` there and read the report."""
    if not (checkout / "tests" / "testing_utils.py").is_file():
        raise ValueError(f"{checkout} has no tests/testing_utils.py: pass the root of a checkout of diffusers.")
    tests = shutil.copytree(checkout / "tests", work / "tests")
    ours = shutil.copytree(CASES, tests / "rectified_flow", ignore=shutil.ignore_patterns("__pycache__"))
    for name in names:
        (ours / f"{name}.py").rename(ours / f"test_{name}.py")
    fill_cache(work / "home")
    report = work / "report.xml"
    # From `work`, the copied tests are the package `tests`; ours would hide it.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/rectified_flow",
        "-q",
        "--timeout=600",
        "--disable-warnings",
        "--tb=short",
        f"--junit-xml={report}",
    ]
    subprocess.run([*command, *arguments], cwd=work, env=environment, check=False)
    return read_report(report)


def read_report(report: Path) -> Outcomes:
    """Read pytest's JUnit report; an error in a fixture is a failure."""
    outcomes: Outcomes = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        outcomes[case.get("classname", "").rpartition(".")[2]][case.get("name", "")] = outcome
    return dict(outcomes)


def own_failures(outcomes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """List the tests that fail on a class of ours and not on the stock class beside it."""
    return [
        f"{name}::{test}"
        for name, tests in outcomes.items()
        for test, outcome in tests.items()
        if not name.endswith("Stock")
        and outcome == "failed"
        and outcomes.get(name.removesuffix("Ours") + "Stock", {}).get(test) != "failed"
    ]


def table(outcomes: Mapping[str, Mapping[str, str]]) -> str:
    """Lay out the counts of ours and of stock, a line for each pair of test classes."""
    lines = [
        f"{'':28}{'ours':>27}{'stock':>30}",
        f"{'':28}" + (" " * 3).join("".join(f"{o:>9}" for o in OUTCOMES) for _ in "12"),
    ]
    total: Counter[tuple[str, str]] = Counter()
    for pair in dict.fromkeys(name.removesuffix("Ours").removesuffix("Stock") for name in outcomes):
        counts = Counter((side, o) for side in ("Ours", "Stock") for o in outcomes.get(pair + side, {}).values())
        total += counts
        lines.append(_line(pair.removeprefix("Test"), counts))
    return "\n".join([*lines, _line("all", total)])


def _line(name: str, counts: Mapping[tuple[str, str], int]) -> str:
    sides = ("".join(f"{counts.get((side, o), 0):>9}" for o in OUTCOMES) for side in ("Ours", "Stock"))
    return f"{name:28}" + "   ".join(sides)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--diffusers", type=Path, required=True, help="root of a source checkout of diffusers")
    known = sorted(path.stem for path in CASES.glob("*.py") if path.stem not in ("__init__", "judge"))
    parser.add_argument("--cases", nargs="+", choices=known, default=known, help="which to run (default: all)")
    args, arguments = parser.parse_known_args()  # the rest, such as `-k text -x`, is pytest's
    with tempfile.TemporaryDirectory() as work:
        outcomes = run_pytest(args.diffusers, Path(work), args.cases, arguments)
    print(table(outcomes))
    failures = own_failures(outcomes)
    print(f"{len(failures)} tests fail on ours and not on stock", *failures, sep="\n  ")
    return 1 if failures or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
