"""Pages in a headless Chromium, through its command line alone: widths, overflow, figures, console.

A wrapper page shows each page in frames of given widths, as a phone and a desk would (media queries follow the frame),
and writes what it measured into its own document, which Chromium prints.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["PHONE", "WIDTHS", "look_at"]

PHONE = 360
WIDTHS = (PHONE, 1280)
_SCRIPT = """
<!DOCTYPE html><meta charset="utf-8"><body></body><script>
const pages = PAGES, widths = WIDTHS, found = {};
function scrolls(element) {
  for (let e = element; e; e = e.parentElement)
    if (/auto|scroll/.test(getComputedStyle(e).overflowX)) return true;
  return false;
}
function measure(frame, width) {
  const page = frame.contentDocument, root = page.documentElement;
  const shown = element => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  const wide = [...page.body.querySelectorAll("*")].filter(e => !scrolls(e) && !e.closest("svg"))
    .filter(e => shown(e) && e.getBoundingClientRect().right > width + 0.5).map(e => e.tagName + "." + e.className);
  return {
    title: page.title, sections: [...page.querySelectorAll("section")].filter(shown).map(e => e.id),
    figures: [...page.querySelectorAll("figure")].map(e => [...e.querySelectorAll("svg")].filter(shown).length),
    texts: [...page.querySelectorAll("figure svg text")].filter(shown)
      .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getCTM().a),
    scroll: root.scrollWidth, client: root.clientWidth, height: root.scrollHeight, wide: wide,
  };
}
let waiting = 0;
for (const [name, address] of Object.entries(pages)) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 2000px; border: 0`;
  waiting++;
  frame.onload = () => {
    (found[name] ??= {})[width] = measure(frame, width);
    if (--waiting === 0) {
      const out = document.createElement("pre");
      out.id = "found";
      out.textContent = JSON.stringify(found);
      document.body.append(out);
    }
  };
  frame.src = address;
  document.body.append(frame);
}
</script>
"""


def look_at(pages: Mapping[str, Path], folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Show pages at phone and desk width.

    Args:
        pages: files by name.
        folder: an empty directory for the wrapper and the browser's profile.

    Returns:
        What was measured by page and width (as text), and the lines of the console.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on the path")
    wrapper = folder / "wrapper.html"
    script = _SCRIPT.replace("PAGES", json.dumps({name: path.as_uri() for name, path in pages.items()}))
    wrapper.write_text(script.replace("WIDTHS", json.dumps(WIDTHS)), encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=20000",
            "--no-first-run",
            "--hide-scrollbars",  # phones lay them over the page
            f"--user-data-dir={folder / 'profile'}", "--window-size=1400,2200", "--dump-dom", wrapper.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    answer = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert answer is not None, f"Chromium measured nothing (exit status {done.returncode}): {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(answer[1])), console
