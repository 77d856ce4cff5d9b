"""The report in a real browser, headless Chromium: on a phone's screen, without an error, a warning or a request."""

import html
import json
import re
import shutil
import subprocess

import pytest
from run_directories import collected, write_run, write_timeline

from expert_iteration.metrics import Metrics
from expert_iteration.report import ROWS_AT_ONCE, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
NUM_PROMPTS = 3000
PHONE_WIDTH = 360  # CSS pixels, of the narrowest phones in use
# Shows a page in a frame as wide as a phone, has a script at work in it, and leaves what that returns as its own title.
STAGE = """<!DOCTYPE html><title>nothing</title>
<iframe id="frame" src="{page}" width="{width}" height="800" style="border: 0" scrolling="no"></iframe>
<script>
const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
frame.onload = async () => {{
  const page = frame.contentDocument, window_ = frame.contentWindow;
  const find = (selector) => [...page.querySelectorAll(selector)];
  const texts = (selector) => find(selector).map((element) => element.textContent.trim());
  const choose = async (id, value) => {{
    const element = page.getElementById(id);
    element.value = value;
    element.dispatchEvent(new Event(element.type === "search" ? "input" : "change"));
    await wait(300); // the search waits until nobody types
  }};
  document.title = JSON.stringify(await (async () => {{ {script} }})());
}};
</script>"""


def browse(page, script, tmp_path):
    """What `script` returns from within the page, and what the browser's console said."""
    stage = tmp_path / "stage.html"
    stage.write_text(STAGE.format(page=page.as_uri(), width=PHONE_WIDTH, script=script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    # Of files each is a world of its own; the stage looks into the page.
    options += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, stage.as_uri()], capture_output=True, text=True, timeout=120)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    return json.loads(html.unescape(title)), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with everything in it, and thousands of samples."""
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir)
    write_timeline(run_dir, num_batches=100)
    metrics = Metrics(run_dir, loggers=[], logging_frequency=1)
    prompts = [collected(f"Prompt <i>{n}</i> & {'long' * 30}", kept=n % 3) for n in range(NUM_PROMPTS)]
    metrics.samples(prompts, step=2, split="train")
    with (run_dir / ".hydra" / "config.yaml").open("a") as file:
        file.write("a_key: " + "value" * 100 + "\n")
    return write_report(run_dir)


def test_the_page_fits_a_phone_and_asks_for_nothing(page, tmp_path):
    script = """
      find("details").forEach((element) => { element.open = true; });
      await wait(100);
      const width = page.documentElement.scrollWidth;
      const inside = (element) => element.closest("svg, pre, .scroll") !== null;
      const wide = find("body *").filter((element) =>
        !inside(element) && element.getBoundingClientRect().right > window_.innerWidth + 1);
      const requests = window_.performance.getEntriesByType("resource").map((entry) => entry.name);
      const rows = find(".group").length;
      return { width, wide: wide.map((element) => element.outerHTML.slice(0, 80)), requests, rows };
    """
    found, console = browse(page, script, tmp_path)
    assert found == {"width": PHONE_WIDTH, "wide": [], "requests": [], "rows": ROWS_AT_ONCE}
    assert console == []


def test_samples_can_be_searched_filtered_sorted_and_paged(page, tmp_path):
    script = """
      const states = {};
      const note = (name) => { states[name] = { found: texts("#found")[0], prompts: texts(".group .question") }; };
      note("start");
      page.getElementById("forth").click(); note("second page");
      page.getElementById("back").click(); note("first page");
      await choose("split", "train"); note("train");
      await choose("sort", "kept"); note("most kept");
      await choose("kept", "none"); note("nothing kept");
      await choose("kept", "");
      await choose("search", "prompt <I>1234</i> & LONG"); note("prompt");
      find(".group")[0].open = true; await wait(100);
      states.responses = texts(".group .response b").concat(texts(".group .response div"));
      await choose("search", "7</i> & " + "long".repeat(30) + " is 3"); note("response");
      await choose("search", "nowhere"); note("nowhere");
      await choose("search", ""); await choose("split", "heldout"); await choose("step", "4"); note("heldout");
      return states;
    """
    found, console = browse(page, script, tmp_path)
    responses = found.pop("responses")
    counts = {name: state["found"] for name, state in found.items()}
    total, first = NUM_PROMPTS + 2, f"1 to {ROWS_AT_ONCE} of"
    assert counts == {
        "start": f"{first} {total}",
        "second page": f"{ROWS_AT_ONCE + 1} to {2 * ROWS_AT_ONCE} of {total}",
        "first page": f"{first} {total}",
        "train": f"{first} {NUM_PROMPTS}",
        "most kept": f"{first} {NUM_PROMPTS}",
        "nothing kept": f"{first} {NUM_PROMPTS // 3}",
        "prompt": "1 to 1 of 1",
        "response": f"{first} {NUM_PROMPTS // 10}",
        "nowhere": "No prompt matches.",
        "heldout": "1 to 1 of 1",
    }
    assert found["start"]["prompts"][0] == "2+2=0?"  # of step 4, the newest
    assert found["first page"] == found["start"]
    assert found["second page"]["prompts"][0].startswith(f"Prompt <i>{ROWS_AT_ONCE - 1}</i> & long")
    assert found["train"]["prompts"][0].startswith("Prompt <i>0</i>")
    assert found["most kept"]["prompts"][0].startswith("Prompt <i>2</i>")
    assert found["prompt"]["prompts"][0].startswith("Prompt <i>1234</i>")
    assert responses[0] == "★ kept · reward 0.75"
    assert responses[4].startswith("Prompt <i>1234</i> & long")
    assert responses[4].endswith("long is 3")
    assert console == []


def test_what_would_be_wrong_is_seen(tmp_path):
    """So the tests above can fail; and no script but the page's own runs, whatever gets into it."""
    write_run(tmp_path)
    page = write_report(tmp_path)
    wide, request = '<p style="width: 500px">wide</p>', '<img src="http://localhost:9/picture.png">'
    bad = f"{wide}{request}<script>document.title = 1</script>"
    page.write_text(page.read_text().replace("</header>", bad + "</header>"))
    found, console = browse(page, "return [page.documentElement.scrollWidth, page.title];", tmp_path)
    assert found == [500 + 16, "Expert iteration: task gsm8k, model ORG/MODEL"]  # 16 of the margin
    assert ["violates the following Content Security Policy" in line for line in console] == [True, True]
