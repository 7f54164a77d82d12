"""What a release says of itself: archives with addresses that work, security promises with their tests, versions."""

import configparser
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import rectified_diffusers

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/someone/rectified_diffusers"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def address() -> SimpleNamespace:
    """The script that the release workflow runs before it builds the archives."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / ".ci" / "address.py")))


def test_the_readme_of_the_archives_has_no_relative_link(address):
    before = read("README.md")
    relative = [link for link in address.LINK.findall(before) if not link[1].startswith("http")]
    assert [path for _, path, _ in relative if not (ROOT / path).exists()] == []
    after = address.absolute(before, ADDRESS, "v1.2.3")
    assert address.LINK.findall(after) == []
    assert f"]({ADDRESS}/raw/v1.2.3/docs/images/one-step.png)" in after
    assert f"]({ADDRESS}/blob/v1.2.3/docs/papers.md#the-papers-table-run-again)" in after
    assert after.count("](http") == before.count("](http") + len(relative)


def test_the_metadata_get_the_addresses_of_the_repository(address):
    config = configparser.ConfigParser()
    config.read_string(address.with_addresses(read("setup.cfg"), ADDRESS, "v1.2.3"))
    urls = dict(line.split(" = ") for line in config["metadata"]["project_urls"].strip().split("\n"))
    assert urls["Repository"] == ADDRESS
    assert urls["Changelog"] == f"{ADDRESS}/blob/v1.2.3/CHANGELOG.md"
    assert urls["Paper"] == "https://arxiv.org/abs/2309.06380"
    with pytest.raises(SystemExit, match="take a fresh checkout"):
        address.with_addresses(address.with_addresses(read("setup.cfg"), ADDRESS, "v1"), ADDRESS, "v1")


def test_the_stated_pythons_are_those_that_are_tested():
    stated = set(re.findall(r"Programming Language :: Python :: (3\.\d+)", read("setup.cfg")))
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    assert stated == set(jobs["python"]["strategy"]["matrix"]["python"])


def test_the_changelog_has_the_version():
    assert f"\n## {rectified_diffusers.__version__} (" in read("CHANGELOG.md")


def test_the_citation_names_the_paper():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert "version" not in citation  # it has its one place
    assert any("InstaFlow" in reference["title"] for reference in citation["references"])


def test_every_promise_of_the_security_page_names_tests_that_exist():
    rows = re.findall(r"^\| (?!guarantee|---)(.+?) \| (.+?) \|$", read("SECURITY.md"), re.MULTILINE)
    assert len(rows) > 15
    for promise, tests in rows:
        # names, each followed, perhaps after others, by the link to its file
        for names, path in re.findall(r"((?:`test_[^`]+`(?:, |; | in )?)*)\[[^\]]+\]\(([^)]+)\)", tests):
            assert (ROOT / path).exists(), f"{path}, of: {promise}"
            defined = (ROOT / path).read_text(encoding="utf-8") if names else ""
            for name in re.findall(r"`(test_\w+)", names):
                assert re.search(rf"^def {name}", defined, re.MULTILINE), f"{name} in {path}, of: {promise}"
        assert "](tests" in tests, promise
