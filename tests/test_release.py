"""A release has one version, and its pages lead to the address that is given."""

import importlib.metadata
import re
import shutil
from pathlib import Path

import pytest

from minilora import cli
from scripts import release

ADDRESS = "https://example.org/me/minilora"


@pytest.fixture
def tree(tmp_path):
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "CHANGELOG.md", "minilora/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(release.ROOT / name, tmp_path / name)
    return tmp_path


def test_every_link_of_the_readme_is_absolute_and_leads_to_a_file(tree):
    release.put_address(tree, ADDRESS)
    links = re.findall(r"\]\(([^)]+)\)", (tree / "README.md").read_text("utf-8"))
    assert len(links) > 20
    for link in links:
        assert link.startswith("https://")
        if link.startswith(ADDRESS):
            assert (release.ROOT / re.sub(r"^/(raw|blob)/main/", "", link.removeprefix(ADDRESS))).exists(), link


def test_the_address_is_in_the_metadata_once(tree):
    release.put_address(tree, ADDRESS)
    assert (tree / "pyproject.toml").read_text("utf-8").count("[project.urls]") == 1
    assert f'Homepage = "{ADDRESS}"' in (tree / "pyproject.toml").read_text("utf-8")
    assert (tree / "CITATION.cff").read_text("utf-8").endswith(f'repository-code: "{ADDRESS}"\n')


def test_errors_name_the_page_at_the_address_of_the_release(monkeypatch, capsys):
    read = importlib.metadata.metadata
    for home, place in ((None, ""), (ADDRESS, f"{ADDRESS}/blob/main/")):

        def metadata(name, home=home):
            message = read(name)
            del message["Project-URL"]
            if home:
                message["Project-URL"] = f"Homepage, {home}"
            return message

        monkeypatch.setattr(importlib.metadata, "metadata", metadata)
        assert cli.main(["finetune", "--lora-r=0"]) == 1
        assert capsys.readouterr().err.endswith(f"; see {place}docs/settings.md\n")
        assert cli.main(["finetune", "--device=abacus"]) == 1
        assert capsys.readouterr().err.endswith(f"; see {place}docs/devices.md\n")


def test_a_checkout_that_is_not_installed_names_the_page_in_the_repository(monkeypatch):
    def metadata(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    assert cli.address_of("settings.md") == "docs/settings.md"


def test_a_release_has_one_version(tree):
    changes = Path(tree, "CHANGELOG.md")
    version = re.search(r'__version__ = "(.+)"', (tree / "minilora/__init__.py").read_text("utf-8"))[1]
    changes.write_text(f"# Changes\n\n## {version}\n", "utf-8")
    assert release.version_of(tree) == version
    changes.write_text("# Changes\n\n## Unreleased\n", "utf-8")
    with pytest.raises(SystemExit, match=r"one version has to stand in .*CHANGELOG.md \(Unreleased\)"):
        release.version_of(tree)
