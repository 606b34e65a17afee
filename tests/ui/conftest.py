"""Three runs with different learning rates, the server that shows them, and a browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parents[2]
RATES = ("1e-4", "1e-3", "1e-2")
SIZE = (1680, 1080)
# To Chromium, a machine without a mouse is a tablet: charts then show their buttons all the time.
MOUSE = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"


@attrs.frozen
class Shown:
    """What was trained, and the URL that was printed for it."""

    url: str
    folders: dict[str, Path]


@pytest.fixture(scope="session")
def programs() -> dict[str, str]:
    """The paths of the browser and its driver. If they are missing, the tests fail at once."""
    found = {program: shutil.which(program) for program in ("chromium", "chromedriver")}
    for program, path in found.items():
        if path is None:
            pytest.fail(f"{program} is not installed; 'make test-ui' installs it", pytrace=False)
    return found


@pytest.fixture(scope="session")
def shown(programs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """Train the runs by the command line, and show them by it."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "settings").symlink_to(ROOT / "settings")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    for rate in RATES:
        done = subprocess.run(
            command("train", rate), cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    served = subprocess.Popen(
        command("ui"),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert served.stdout is not None
        url = next((line.strip() for line in served.stdout if line.startswith("http")), None)
        assert url, "fundamentallm ui ended without a URL"
        yield Shown(url, {name(rate): folder / "runs" / name(rate) for rate in RATES})
    finally:
        os.killpg(served.pid, signal.SIGTERM)
        served.wait(60)


def command(verb: str, rate: str = RATES[-1]) -> list[str]:
    """Return what one would type: the tour has the same."""
    words = [str(Path(sys.executable).with_name("fundamentallm")), verb]
    if verb == "ui":
        return [*words, f"runs/{name(rate)}", "--port", str(free_port())]
    settings = {
        "adamw.lr": rate,
        "run.length": "300 steps",
        "run.validate_every": "50 steps",
        "checkpoint.every": "100 steps",
        "mlflow.experiment": "learning rates",
        "mlflow.system_seconds": "1",
    }
    words += ["settings/tiny.toml", "--plugin", "mlflow"]
    words += ["--no-plugin", "progress", "--run-dir", f"runs/{name(rate)}"]
    return [*words, *(word for pair in settings.items() for word in ("--set", "=".join(pair)))]


def name(rate: str) -> str:
    return f"lr-{rate}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def browser(programs):
    """A headless Chromium that has never been anywhere."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = programs["chromium"]
    for word in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "hide-scrollbars",
        "lang=en-US",
        "no-proxy-server",
        f"blink-settings={MOUSE}",
    ):
        options.add_argument(f"--{word}")
    chrome = Chrome(options, Service(programs["chromedriver"]))
    width, height = SIZE
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": False,
        },
    )
    chrome.set_page_load_timeout(120)
    yield chrome
    chrome.quit()


@pytest.fixture
def keep(browser):
    """Keep a picture of the page under docs/images, if SCREENSHOTS is set; else do nothing."""

    def keep(title: str) -> None:
        if not os.environ.get("SCREENSHOTS"):
            return
        import io

        from PIL import Image

        page = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        page = page.resize((1400, 900), Image.Resampling.LANCZOS)
        page = page.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        folder = ROOT / "docs" / "images"
        folder.mkdir(exist_ok=True)
        page.save(folder / f"mlflow-{title}.png", optimize=True)

    return keep
