"""Build a release: wheel, source distribution and site, with the address of the project in them.

    python scripts/release.py https://github.com/OWNER/minilora   # needs the extra `dev`

Builds the last commit from a copy in which links of the README are absolute, and `[project.urls]` and CITATION.cff have
the address. Installs both distributions in empty environments, runs them there, and prints the commands that are left.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
URLS = """[project.urls]
Homepage = "{address}"
Documentation = "{address}#readme"
Issues = "{address}/issues"
Changelog = "{address}/blob/main/CHANGELOG.md"

"""


def version_of(tree: Path) -> str:
    """Return the version of a tree, which package, CITATION.cff and the newest section of CHANGELOG.md have to share.

    Raises:
        SystemExit: they differ.
    """
    places = {
        "minilora/__init__.py": r'^__version__ = "(.+)"',
        "CITATION.cff": r"^version: (\S+)",
        "CHANGELOG.md": r"^## (\S+)",
    }
    found = {name: re.search(pattern, (tree / name).read_text("utf-8"), re.M)[1] for name, pattern in places.items()}
    if len({*found.values()}) > 1:
        raise SystemExit("one version has to stand in " + ", ".join(f"{name} ({each})" for name, each in found.items()))
    return found["CITATION.cff"]


def with_absolute_links(page: str, address: str) -> str:
    """Return a Markdown page whose links to files of the project lead to the address; pictures to their bytes."""
    page = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{address}/raw/main/", page)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!https?:|#)", rf"\1{address}/blob/main/", page)


def put_address(tree: Path, address: str) -> None:
    """Write the address into the files of a tree that have one when they are published."""
    readme, citation, project = (tree / name for name in ("README.md", "CITATION.cff", "pyproject.toml"))
    readme.write_text(with_absolute_links(readme.read_text("utf-8"), address), "utf-8")
    citation.write_text(citation.read_text("utf-8") + f'repository-code: "{address}"\n', "utf-8")
    before, _, after = project.read_text("utf-8").partition("[project.scripts]")
    project.write_text(f"{before}{URLS.format(address=address)}[project.scripts]{after}", "utf-8")


def try_in_an_empty_environment(distribution: Path, folder: Path) -> None:
    """Install a distribution into a new environment, and fine-tune for two steps."""
    venv.create(folder, with_pip=True)
    commands = folder / ("Scripts" if sys.platform == "win32" else "bin")
    run([commands / "python", "-m", "pip", "install", "--quiet", distribution], folder)
    run([commands / "minilora", "finetune", "--max-steps", "2", "--general-data", "none", "--out", "run"], folder)


def run(command: list[str | Path], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the project, where its files are at ADDRESS/blob/main/NAME")
    address = parser.parse_args().address.rstrip("/")
    if not re.fullmatch(r"https://[\w.-]+/\S+", address):
        parser.error(f"an address such as https://github.com/OWNER/minilora, not {address!r}")
    dist = ROOT / "dist"
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name, "tree")
        run(["git", "clone", "--quiet", ROOT, tree], ROOT)
        version = version_of(tree)
        put_address(tree, address)
        run([sys.executable, "-m", "build", "--outdir", dist, tree], tree)
        built = [*dist.glob(f"minilora-{version}*")]
        run([sys.executable, "-m", "twine", "check", "--strict", *built], tree)
        for distribution in built:
            try_in_an_empty_environment(distribution, Path(name, distribution.name))
        run([sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", tree / "site", ROOT / "_site"], tree)
    print(f"dist/ and _site/ are minilora {version}. What is left:", f"  git tag v{version}", sep="\n")
    print(f"  git push {address} main v{version}", f"  twine upload dist/minilora-{version}*", sep="\n")


if __name__ == "__main__":
    main()
