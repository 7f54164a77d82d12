"""How the runs of diffusers' own tests are counted; the runs themselves need a checkout of diffusers."""

import pytest

from tests.diffusers_suite.run import count, fill_cache, own_failures, read_report, run_pytest, table, write

REPORT = """<testsuites><testsuite>
<testcase classname="tests.rectified_flow.test_lora.TestLoraStock" name="test_fuse"/>
<testcase classname="tests.rectified_flow.test_lora.TestLoraStock" name="test_slices"><failure/></testcase>
<testcase classname="tests.rectified_flow.test_lora.TestLoraOurs" name="test_fuse"><error/></testcase>
<testcase classname="tests.rectified_flow.test_lora.TestLoraOurs" name="test_slices"><failure/></testcase>
<testcase classname="tests.rectified_flow.test_lora.TestLoraOurs" name="test_gpu"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_failure_is_our_own_where_stock_does_not_fail(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    outcomes = read_report(tmp_path / "report.xml")
    assert outcomes["TestLoraOurs"] == {"test_fuse": "failed", "test_slices": "failed", "test_gpu": "skipped"}
    assert own_failures(outcomes) == ["TestLoraOurs::test_fuse"]
    rows = count(outcomes)
    assert rows == {
        "Lora": {
            "Ours": {"passed": 0, "failed": 2, "skipped": 1},
            "Stock": {"passed": 1, "failed": 1, "skipped": 0},
            "own failures": ["TestLoraOurs::test_fuse"],
        }
    }
    assert table(rows).splitlines()[2:] == ["| Lora | 0 | 2 | 1 | 1 | 1 | 0 |", "| all | 0 | 2 | 1 | 1 | 1 | 0 |"]


def test_results_of_other_cases_stay_while_the_versions_do(tmp_path):
    rows = {
        "Lora": {side: {"passed": 2, "failed": 0, "skipped": 1} for side in ("Ours", "Stock")} | {"own failures": []}
    }
    output = tmp_path / "results" / "suite"
    write(output, "lora", rows, {"diffusers": "0.42.1"})
    write(output, "scheduler", {"Scheduler": rows["Lora"]}, {"diffusers": "0.42.1"})
    report = output.with_suffix(".md").read_text()
    assert "| Scheduler | 2 | 0 | 1 |" in report
    assert "| all | 4 | 0 | 2 | 4 | 0 | 2 |" in report
    assert "- fail on ours and not on stock: none" in report
    write(output, "scheduler", {"Scheduler": rows["Lora"]}, {"diffusers": "0.43.0"})
    report = output.with_suffix(".md").read_text()
    assert "Lora" not in report
    assert "diffusers 0.43.0" in report


def test_a_collection_error_is_our_own_failure(tmp_path):
    error = '<testsuite><testcase classname="" name="tests.rectified_flow.test_lora"><error/></testcase></testsuite>'
    (tmp_path / "report.xml").write_text(error)
    outcomes = read_report(tmp_path / "report.xml")
    assert own_failures(outcomes) == ["::tests.rectified_flow.test_lora"]
    assert count(outcomes)[""]["own failures"] == own_failures(outcomes)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tests/testing_utils\.py"):
        run_pytest(tmp_path, tmp_path / "work", [], [])


def test_the_models_that_the_tests_ask_for_load_from_the_cache(tmp_path):
    from transformers import CLIPTextModel, CLIPTokenizer

    fill_cache(tmp_path)
    for repo in ("hf-internal-testing/tiny-random-clip", "peft-internal-testing/tiny-clip-text-2"):
        tokenizer = CLIPTokenizer.from_pretrained(repo, cache_dir=tmp_path / "hub", local_files_only=True)
        assert tokenizer.model_max_length == 77
    assert (
        CLIPTextModel.from_pretrained(repo, cache_dir=tmp_path / "hub", local_files_only=True).config.hidden_size == 32
    )
