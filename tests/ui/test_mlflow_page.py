"""What one sees who opens the URL that `fundamentallm ui` prints: read off the page itself."""

from __future__ import annotations

import json
import shlex
from itertools import count

import pytest

pytestmark = [pytest.mark.ui, pytest.mark.timeout(600)]

RATES = {"lr-1e-4": 0.0001, "lr-1e-3": 0.001, "lr-1e-2": 0.01}
CHARTS = {"optim/lr", "optim/grad_norm", "train/loss", "train/tokens", "val/loss"}
LOSSES = {"train/loss", "val/loss"}
ROW = "//*[@role='row']"
SECTION = "[data-testid='experiment-view-compare-runs-add-chart']"
CARD = "[data-testid='experiment-view-compare-runs-card']"
# Of each chart its metric, how many points each line has, and all that is written in it. The metric
# is that of the legend: titles are shortened on the page of one run.
DRAWN = f"""
return [...document.querySelectorAll("{CARD}")].map(card => [
  (card.textContent.match(/ [(]([a-z]+[/][a-z_]+)[)]/) || [""]).at(-1),
  [...card.querySelectorAll(".scatterlayer .trace")]
    .filter(line => line.querySelector("path.js-line"))
    .map(line => line.querySelectorAll("path.point").length)
    .filter(points => points > 0),
  card.textContent,
])
"""


class Page:
    """The page in the browser, with what a person does there: look and click."""

    def __init__(self, browser, keep):
        self.browser, self.keep = browser, keep

    @property
    def text(self):
        return self.browser.find_element("tag name", "body").text

    def all(self, path):
        return [one for one in self.browser.find_elements("xpath", path) if one.is_displayed()]

    def until(self, seen, what):
        """Wait until something is on the page; return it."""
        from selenium.common.exceptions import TimeoutException, WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            # The page replaces its parts while one looks at them: then look again.
            wait = WebDriverWait(self.browser, 60, ignored_exceptions=[WebDriverException])
            return wait.until(lambda _: seen())
        except TimeoutException:
            raise AssertionError(f"not on the page: {what}. The page:\n{self.text}") from None

    def click(self, path):
        self.until(lambda: [one.click() or one for one in self.all(path)[:1]], path)

    def open(self, url):
        """Open a URL as on a first visit."""
        self.browser.get(url)
        self.until(lambda: "matching runs" in self.text, "the list of runs")
        # MLflow opens its assistant next to the charts, until it is closed once.
        for one in self.all("//*[@data-component-id='mlflow.assistant.chat_panel.close']"):
            one.click()

    def enter(self, name):
        """Go on to the page of a run."""
        self.click(f"//a[.='{name}']")
        # From there on MLflow shows the menu that was chosen last, whatever the URL said.
        self.click("//*[@role='button'][.='Model training']")
        self.click(f"//a[.='{name}']")
        self.until(lambda: "Model metrics" in self.text, f"the page of {name}")

    def drawn(self):
        """Return what ``charts`` does of those that are in sight by now."""
        return {name: (n, text) for name, n, text in self.browser.execute_script(DRAWN) if n}

    def charts(self, names):
        """Return metric -> (points of each line, text) of the charts, once they are drawn."""
        found, looks = {}, count()

        def drawn():
            sections = self.browser.find_elements("css selector", SECTION)
            if not sections:
                return False
            look = sections[next(looks) % len(sections)]  # a chart is drawn when it is in sight
            self.browser.execute_script("arguments[0].scrollIntoView()", look)
            found.update(self.drawn())
            return names <= set(found)

        self.until(drawn, f"the charts {sorted(names)}")
        top = self.browser.find_element("css selector", SECTION)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'end'})", top)
        return found

    def cells(self):
        """Return the rows of the page's tables as first cell -> second cell."""
        rows = [row.find_elements("xpath", "./*[@role='cell']") for row in self.all(ROW)]
        return {row[0].text: row[1].text for row in rows if len(row) > 1}


@pytest.fixture
def page(browser, keep):
    return Page(browser, keep)


def test_the_printed_url_opens_the_charts_that_compare_the_runs(page, shown):
    page.open(shown.url)
    page.until(lambda: set(RATES) <= {link.text for link in page.all("//a")}, "the runs' names")
    assert "3 matching runs" in page.text
    assert "Evaluation runs" not in page.text  # as MLflow's pages for language models have it
    charts = page.charts(CHARTS)
    assert set(charts) == CHARTS
    for title, (lines, text) in charts.items():
        points = 6 if title.startswith("val/") else 30
        assert lines == [points] * 3, title
        assert all(f"{name} ({title})" in text for name in RATES), title
    sections = [
        one.text.split() for one in page.all("//*[@role='button'][contains(., 'Add chart')]")
    ]
    assert [words[:2] for words in sections[:3]] == [
        ["optim", "(2)"],
        ["train", "(2)"],
        ["val", "(1)"],
    ]
    page.click("//*[@role='button'][starts-with(normalize-space(), 'optim')]")
    page.until(lambda: page.drawn().keys() >= LOSSES, "the losses, next to each other")
    page.keep("compare")


@pytest.mark.parametrize("name", RATES)
def test_a_run_is_described_with_its_metrics_and_parameters(page, shown, name):
    page.open(shown.url)
    page.enter(name)
    page.until(lambda: "Parameters (" in page.text, "the parameters")
    (note,) = page.all("//*[@data-testid='note-editor-preview-content']")
    if page.all("//button[.='Show more']"):
        page.click("//button[.='Show more']")
    assert note.find_element("tag name", "strong").text == name
    assert "33,952 weights, 300 steps" in note.text
    train, resume = (
        one.get_property("textContent") for one in note.find_elements("tag name", "pre")
    )
    assert "--set adamw.lr=" + name.removeprefix("lr-") in train
    assert shlex.split(resume) == ["fundamentallm", "resume", str(shown.folders[name])]
    page.keep("description")
    cells = page.cells()
    assert float(cells["adamw.lr"]) == RATES[name]
    assert cells["run.length"] == "300 steps"
    assert cells["text.source"] == "python-stdlib"
    rows = (shown.folders[name] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(rows[-1])["metrics"]
    assert set(last) >= CHARTS
    assert {key: float(cells[key]) for key in last} == last


def test_the_tabs_of_a_run_show_its_curves_and_the_machine(page, shown):
    page.open(shown.url)
    page.enter("lr-1e-2")
    page.click("//*[@role='tab'][.='Model metrics']")
    charts = page.charts(CHARTS)
    assert {name: lines for name, (lines, _) in charts.items()} == {
        name: [6 if name.startswith("val/") else 30] for name in CHARTS
    }
    page.click("//*[@role='button'][starts-with(normalize-space(), 'optim')]")
    page.until(lambda: page.drawn().keys() >= LOSSES, "the losses, next to each other")
    page.keep("run")
    page.click("//*[@role='tab'][.='System metrics']")
    page.charts({"system/cpu_utilization_percentage", "system/training_memory_megabytes"})
