"""The page: nothing is asked of the network, nothing is lost, and a real browser shows it."""

import html.parser
import json
import re
import shutil
import subprocess

import benchmarks
import pytest

from research.bench import comparison, drawing, page
from research.bench.result import FIGURES, Figure, unavailable


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    noisy = unavailable("too noisy: <b>14%</b> & more")
    joules = Figure(value=70.0, qualifier="estimated", how='board power of a "chip"')
    rows = benchmarks.row("cnn", 0.03), benchmarks.row("lstm", 0.002, step_p50=noisy)
    slow = benchmarks.row("cnn", 0.01, joules_per_step=joules), benchmarks.row("lstm", 0.1)
    found = {
        "first": benchmarks.result(*slow, benchmarks.row("mlp", 0.001)),
        "<second>": benchmarks.result(*rows, benchmarks.row("mlp", 0.004)),
        "plan": benchmarks.plan(),
        "bad": {},
    }
    paths = [benchmarks.written(folder / f"{name}.json", one) for name, one in found.items()]
    return comparison.read(paths)


@pytest.fixture(scope="module")
def made(compared):
    return page.html_page(compared)


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_is_asked_of_the_network(made):
    tags = Tags(made).found
    asking = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
    links = [attrs[name] for _, attrs in tags for name in asking if name in attrs]
    assert links
    assert all(link.startswith(("data:,", "#")) for link in links)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp|import\(", made)
    assert {tag for tag, _ in tags}.isdisjoint({"iframe", "object", "embed", "form", "img"})


def test_every_figure_is_there_with_how_it_was_got(compared, made):
    titles = [attrs["title"] for tag, attrs in Tags(made).found if "title" in attrs]
    assert "unavailable: too noisy: <b>14%</b> & more" in titles
    assert 'estimated: board power of a "chip"' in titles
    assert "unavailable: does not fit: 3 GiB too many" in titles
    shown = [attrs for tag, attrs in Tags(made).found if "figure" in (attrs.get("class") or "")]
    assert all(attrs["title"] for attrs in shown)
    assert f"measured: {compared.ratio('<second>', 'cnn').how}" in titles
    # Of every machine and model, but for the shares of the datasheet's peak, which there is not.
    columns = len(FIGURES) - 3 + 1
    assert len(shown) >= 2 * 3 * columns


def test_text_of_files_is_text(made):
    assert "<second>" not in made
    assert "&lt;second&gt;" in made
    assert "<b>14%" not in made
    assert "not a benchmark" in made


def test_figures_are_written_as_svg_and_pdf(compared, tmp_path):
    paths = drawing.save(compared, tmp_path / "new" / "figures")
    stems = {path.stem for path in paths}
    assert stems == {"speed", "target", "roofline_first", "roofline_-second-"}
    for path in paths:
        start = path.read_bytes()[:300]
        assert start.startswith(b"%PDF" if path.suffix == ".pdf" else b"<?xml")
    speed = (tmp_path / "new" / "figures" / "speed.svg").read_text()
    for word in ("cnn", "lstm", "mlp", "h100:8, planned", "times as fast as first"):
        assert word in speed


def test_a_step_stands_on_the_roofline_where_it_was_measured():
    assert drawing.point(benchmarks.row("cnn", 0.01)) == (10.0, 1e9 / 0.01)
    assert drawing.point(benchmarks.row("cnn", step_seconds=unavailable("noisy"))) is None


# In a real browser.

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TRY = """
<script>
addEventListener("load", () => {
  const out = {};
  const table = document.querySelector("table[aria-label=Steps]");
  const column = name => [...table.tHead.rows[0].cells].findIndex(
    head => head.textContent === name);
  const order = name =>
    [...table.tBodies[0].rows].map(row => row.cells[column(name)].dataset.value);
  const press = name => table.tHead.rows[0].cells[column(name)].firstElementChild.click();
  press("p50"); out.up = order("p50");
  press("p50"); out.down = order("p50");
  out.sorted = table.tHead.rows[0].cells[column("p50")].getAttribute("aria-sort");
  press("Model"); out.models = order("Model");
  const figure = table.querySelector(".figure");
  figure.focus(); out.focused = document.activeElement === figure;
  figure.click();
  const how = document.getElementById("how"), box = how.getBoundingClientRect();
  out.open = how.matches(":popover-open"); out.how = how.textContent; out.title = figure.title;
  out.inside = box.left >= 0 && box.right <= innerWidth && box.height > 0;
  out.width = innerWidth; out.scroll = document.documentElement.scrollWidth;
  out.wide = [...document.querySelectorAll("body *")].filter(e => !e.closest("svg") &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));
  out.table = Math.max(...[...document.querySelectorAll("table")].map(
    one => one.getBoundingClientRect().right));
  out.requests = performance.getEntriesByType("resource").map(entry => entry.name);
  out.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  out.paper = getComputedStyle(document.body).backgroundColor;
  out.ink = getComputedStyle(document.body).color;
  parent.document.title = JSON.stringify(out);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 700, 1280])
def test_a_browser_sorts_explains_and_fits(made, tmp_path, width):
    inner = made.replace("</body>", TRY + "</body>").replace("&", "&amp;").replace('"', "&quot;")
    frame = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{inner}"></iframe>'
    path = tmp_path / "frame.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><title></title>{frame}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900"]
    command += ["--virtual-time-budget=5000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    out = json.loads(html.unescape(title[1]))
    known = sorted((float(x) for x in out["up"] if x), key=float)
    assert [float(x) for x in out["up"][: len(known)]] == known
    assert [float(x) for x in out["down"][: len(known)]] == known[::-1]
    assert out["up"][-1] == out["down"][-1] == ""  # what is unavailable is last either way
    assert out["sorted"] == "descending"
    assert out["models"] == sorted(out["models"])
    assert out["focused"]
    assert out["open"]
    assert out["inside"]
    assert out["how"] == out["title"] != ""
    assert out["width"] == width
    assert out["scroll"] <= width, out["wide"]
    if width != 700:  # between a phone and a desk a wide table scrolls by itself
        assert out["table"] <= width
    assert out["requests"] == []
    assert out["paper"] != out["ink"]
