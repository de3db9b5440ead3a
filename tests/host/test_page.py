"""The report's page in a real browser: light and dark, wide and narrow, on paper. Needs Debian's `chromium`."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import optax_guard as og
from optax_guard.report import report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
# What the page looks like from inside, written where --dump-dom shows it.
PROBE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const image = document.querySelector("img"), tabbed = document.querySelectorAll("[tabindex='0'], summary");
  const seen = {
    hidden: [...document.querySelectorAll(".scroll")].map(e => e.scrollWidth - e.clientWidth),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    back: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    picture: image.naturalWidth, loaded: image.complete && image.naturalWidth > 0,
    sources: [...document.querySelectorAll("source")].map(s => s.srcset === image.currentSrc),
    focusable: [...tabbed].filter(e => { e.focus(); return document.activeElement === e; }).length,
    tabbed: tabbed.length,
  };
  document.title = "probe" + JSON.stringify(seen);
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a run with a NaN and a spike, and names too long for a telephone."""
    params = {"decoder": {f"layer_{i}_with_a_rather_long_name_for_a_kernel": jnp.ones(2) for i in range(30)}}
    tx = og.guard(optax.sgd(1e-3), og.record_leaves(), og.clip_by_global_norm(10.0))
    state = tx.init(params)
    for size in (*[0.5] * 20, jnp.nan, 40.0, *[0.5] * 5):
        grads = {"decoder": {name: jnp.full(2, size) for name in params["decoder"]}}
        params, state = og.apply_gradients(tx, grads, state, params, value=jnp.asarray(2.0))
    path = report(state, params, tmp_path_factory.mktemp("page") / "page.html")
    path.write_text(path.read_text().replace("</head>", PROBE + "</head>"))
    return path


def chromium(profile: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    quiet += ("--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={profile}")
    return subprocess.run(
        [CHROMIUM, *quiet, *arguments], capture_output=True, text=True, timeout=120, check=True
    ).stdout


@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 500)])
def test_the_page_fits_is_readable_and_takes_the_right_picture(
    page: Path, tmp_path: Path, dark: bool, width: int
) -> None:
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    text = chromium(tmp_path, *scheme, f"--window-size={width},900", "--dump-dom", page.as_uri())
    seen = json.loads(re.search(r"<title>probe(\{.*?\})</title>", text, re.S).group(1).replace("&quot;", '"'))
    assert seen["overflow"] <= 0
    assert max(seen["hidden"]) <= 0  # nothing to scroll to, at either width
    assert seen["loaded"]
    assert seen["focusable"] == seen["tabbed"] >= 4
    assert (seen["picture"] < 600) == (width < 600)
    brightness = {name: sum(map(int, re.findall(r"\d+", seen[name])[:3])) / 765 for name in ("back", "ink")}
    assert (brightness["back"] < 0.2) == dark
    assert abs(brightness["back"] - brightness["ink"]) > 0.7
    # Sources in the page: narrow and dark, narrow, dark; none for the wide light picture.
    expected = [True, False, False] if dark else [False, False, False]
    assert seen["sources"] == expected


def test_the_page_prints(page: Path, tmp_path: Path) -> None:
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri())
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
