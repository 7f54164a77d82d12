"""Run diffusers' own test classes on our classes, and on the stock ones beside them.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers
    python -m pip install parameterized torchsde pytest-timeout requests_mock
    python -m tests.diffusers_suite.run --diffusers diffusers

The tests are not part of diffusers' wheel; they are copied out of a checkout, which stays as it is, with `cases/` as
one more folder among them, and judge the *installed* diffusers. The tiny models that they load from the Hub are made
here and put into a cache of their own, so the run is offline. It fails if a test fails on ours and not on the stock
class.

Each case is a run of pytest by itself, of minutes. With `--output benchmarks/results/diffusers_suite` the counts are
written there after each, as JSON and Markdown; those of other cases that were measured with the same versions stay, so
that an interrupted run is gone on with by `--cases`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.diffusers_suite.cases.pairs import CASES
from tests.tiny import make_tokenizer

OUR_FOLDER = Path(__file__).parent / "cases"
TOKENIZER_REPOS = ("hf-internal-testing/tiny-random-clip", "peft-internal-testing/tiny-clip-text-2")
TEXT_MODEL_REPO = "peft-internal-testing/tiny-clip-text-2"
CASE_NAMES = sorted([*CASES, "scheduler"])
OUTCOMES = ("passed", "failed", "skipped")
SIDES = ("Ours", "Stock")
Outcomes = dict[str, dict[str, str]]  # class -> test -> one of OUTCOMES
_TEST_FILE = "from .pairs import classes_of\n\nglobals().update(classes_of({name!r}))\n"


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
    """Return the text encoder of the LoRA tests, 32 channels wide as their U-Nets expect, with any weights."""
    tokens = make_tokenizer()
    sizes = {"hidden_size": 32, "projection_dim": 32, "intermediate_size": 37}
    layers = {"num_hidden_layers": 5, "num_attention_heads": 4}
    ids = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(tokens), **sizes, **layers, **ids))


def run_pytest(checkout: Path, work: Path, names: list[str], arguments: list[str]) -> Outcomes:
    """Copy the tests of the checkout to `work`, add ours, run those of `names` there and read the report."""
    if not (checkout / "tests" / "testing_utils.py").is_file():
        raise ValueError(f"{checkout} has no tests/testing_utils.py: pass the root of a checkout of diffusers.")
    tests = shutil.copytree(checkout / "tests", work / "tests")
    ours = shutil.copytree(OUR_FOLDER, tests / "rectified_flow", ignore=shutil.ignore_patterns("__pycache__"))
    for name in names:
        text = "from .scheduler import *\n" if name == "scheduler" else _TEST_FILE.format(name=name)
        (ours / f"test_{name}.py").write_text(text)
    fill_cache(work / "home")
    report = work / "report.xml"
    # From `work`, the copied tests are the package `tests`; ours would hide it.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pytest", "tests/rectified_flow", "-q", "--timeout=600", "--disable-warnings"]
    command += ["--tb=short", f"--junit-xml={report}"]
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


def count(outcomes: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Count the outcomes on ours and on stock, and list our own failures, for each pair of test classes."""
    failures = own_failures(outcomes)
    rows: dict[str, dict[str, Any]] = {}
    for pair in dict.fromkeys(re.sub("(Ours|Stock)$", "", name) for name in outcomes):
        sides = {side: Counter(outcomes.get(pair + side, {}).values()) for side in SIDES}
        rows[pair.removeprefix("Test")] = {
            **{side: {outcome: counts[outcome] for outcome in OUTCOMES} for side, counts in sides.items()},
            "own failures": [name for name in failures if re.match(f"{pair}(Ours)?::", name)],
        }
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out the counts of ours and of stock in Markdown, a line for each pair of test classes and one for all."""
    lines = [
        "| test class | " + " | ".join(f"{side.lower()} {outcome}" for side in SIDES for outcome in OUTCOMES) + " |",
        "|---|" + "---:|" * len(SIDES) * len(OUTCOMES),
    ]
    total: Counter[tuple[str, str]] = Counter()
    for name, row in rows.items():
        counts = {(side, outcome): row[side][outcome] for side in SIDES for outcome in OUTCOMES}
        total.update(counts)
        lines.append(_line(name, counts))
    return "\n".join([*lines, _line("all", total)])


def _line(name: str, counts: Mapping[tuple[str, str], int]) -> str:
    return f"| {name} | " + " | ".join(str(counts[side, outcome]) for side in SIDES for outcome in OUTCOMES) + " |"


def versions(checkout: Path) -> dict[str, str]:
    """Name the versions that a count depends on: of the tests and of what they judge."""
    source = (checkout / "src" / "diffusers" / "__init__.py").read_text(encoding="utf-8")
    of_tests = re.search(r'__version__ = "(.+)"', source)
    packages = ("diffusers", "transformers", "peft", "torch")
    return {"tests of diffusers": of_tests[1] if of_tests else "unknown"} | {name: version(name) for name in packages}


def write(output: Path, case: str, rows: Mapping[str, Any], of: Mapping[str, str]) -> None:
    """Write the counts of a case as OUTPUT.json and OUTPUT.md, beside those that are there of the same versions."""
    file = output.with_suffix(".json")
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    cases = before["cases"] if before.get("versions") == of else {}
    cases[case] = {"date": datetime.now(timezone.utc).isoformat(timespec="minutes"), "rows": rows}
    cases = {name: cases[name] for name in CASE_NAMES if name in cases}
    output.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"versions": of, "cases": cases}, indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(report(cases, of), encoding="utf-8")


def report(cases: Mapping[str, Any], of: Mapping[str, str]) -> str:
    """Lay out the counts of all cases, our own failures, the versions and the dates."""
    rows = {name: row for case in cases.values() for name, row in case["rows"].items()}
    failures = [failure for row in rows.values() for failure in row["own failures"]]
    facts = {
        "fail on ours and not on stock": ", ".join(failures) or "none",
        "command": "python -m tests.diffusers_suite.run --diffusers CHECKOUT --output OUTPUT",
        "versions": ", ".join(f"{name} {number}" for name, number in of.items()),
        "finished": ", ".join(f"{name} {case['date']}" for name, case in cases.items()),
    }
    end = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    return f"# diffusers' own tests on our classes and on the stock ones\n\n{table(rows)}\n\n{end}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--diffusers", type=Path, required=True, help="root of a source checkout of diffusers")
    parser.add_argument(
        "--cases", nargs="+", choices=CASE_NAMES, default=CASE_NAMES, help="which to run (default: all)"
    )
    parser.add_argument("--output", type=Path, help="where to write the counts, without suffix")
    args, arguments = parser.parse_known_args()  # the rest, such as `-k text -x`, is pytest's
    if args.output and arguments:
        parser.error(
            f"--output is for whole cases, got {' '.join(arguments)}, which may leave tests out. Leave one out."
        )
    rows: dict[str, Any] = {}
    for case in args.cases:
        with tempfile.TemporaryDirectory() as work:
            counted = count(run_pytest(args.diffusers, Path(work), [case], arguments))
        rows |= counted
        if args.output:
            write(args.output, case, counted, versions(args.diffusers))
    print(table(rows))
    failures = [failure for row in rows.values() for failure in row["own failures"]]
    print(f"{len(failures)} tests fail on ours and not on stock", *failures, sep="\n  ")
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
