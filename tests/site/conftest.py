import os
import shutil

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `site`: pip install -e '.[site]'")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium, or CHROMIUM=/path/to/it")
    with playwright.sync_playwright() as driver:
        # The sandbox of Chromium needs rights that containers do not give.
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
