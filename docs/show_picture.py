"""Draw ``docs/images/show.png``: the page of ``torchopt.visual.show``, as a browser shows it.

Five steps of MetaAdam on a small convolutional network, with a cut before the fourth, and a weight
that is selected. It needs playwright and Chromium::

    python docs/show_picture.py
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from torch import nn
from torch.nn.functional import cross_entropy

import torchopt
from torchopt.visual.show import GraphPage


PICTURE = Path(__file__).parent / "images" / "show.png"
STEPS, CUT_AFTER = 5, 3


def page_of_a_loop() -> GraphPage:
    """Return the page of a loop whose graph is cut once."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(32, 5),
    )
    lr = torch.tensor(0.01, requires_grad=True)
    names = {**dict(net.named_parameters()), "lr": lr}
    x, y = torch.randn(10, 1, 14, 14), torch.arange(10) % 5
    inner = torchopt.MetaAdam(net, lr=lr)
    for step in range(1, STEPS + 1):
        inner.step(cross_entropy(net(x), y))
        if step == CUT_AFTER:
            torchopt.stop_gradient(net)
    loss = cross_entropy(net(x), y)
    return torchopt.visual.show(loss, names, title="Five steps of MetaAdam")


def main() -> None:
    """Open the page, select a weight, and save what is seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURE, help="the picture to write")
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    options = parser.parse_args()
    scheme = "dark" if options.dark else "light"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as library:
        path = page_of_a_loop().save(Path(folder) / "show.html")
        browser = library.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 720}, color_scheme=scheme)
        page.goto(path.as_uri())
        page.locator("#panel-body").get_by_role("button", name="0.weight").click()
        page.mouse.move(0, 0)
        page.wait_for_timeout(2000)  # for the worker and the last drawing
        page.screenshot(path=options.output)
        browser.close()


if __name__ == "__main__":
    main()
