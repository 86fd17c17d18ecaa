"""A real headless browser, driven by a script that is put at the end of the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NO_BROWSER = "no Chromium here: .ci/browser installs it (apt-get install chromium)"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

# The page's own policy would stop this script too, so the test gives it a hash of its own.
_DRIVER = """
const result = {};
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
document.addEventListener("securitypolicyviolation", (e) => errors.push(e.violatedDirective));
const visible = (node) => node.checkVisibility();
const shown = (selector) => [...document.querySelectorAll(selector)].filter(visible);
const type = (text) => {
  const input = document.getElementById("filter");
  input.value = text;
  input.dispatchEvent(new Event("input"));
};
try {
%s
} catch (error) { errors.push(String(error)); }
result.errors = errors;
result.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
const out = document.createElement("pre");
out.id = "driver-result";
out.textContent = JSON.stringify(result);
document.body.append(out);
"""


def drive(page: str, script: str, folder: Path) -> dict[str, Any]:
    """Open a page in Chromium and run a script on it; returns what the script put in ``result``."""
    assert CHROMIUM is not None
    driver = _DRIVER % script
    digest = base64.b64encode(hashlib.sha256(driver.encode()).digest()).decode()
    assert page.count("script-src '") == 1
    page = page.replace("script-src '", f"script-src 'sha256-{digest}' '")
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>{driver}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r'<pre id="driver-result">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(unescape(found[1]))
    return result
