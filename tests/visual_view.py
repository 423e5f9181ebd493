"""A page of torchopt.visual.show in a browser, as the tests see and drive it."""

import time


# How many pixels around a place of the page have exactly one of the page's colours.
PIXELS = """([name, left, top, width, height]) => {
    const colour = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const [r, g, b] = colour.match(/[0-9a-f]{2}/g).map(part => parseInt(part, 16));
    const canvas = document.getElementById("picture");
    const place = canvas.getBoundingClientRect();
    const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, place.left - left, place.top - top);
    const { data } = copy.getImageData(0, 0, width, height);
    let found = 0;
    for (let k = 0; k < data.length; k += 4)
        found += data[k] === r && data[k + 1] === g && data[k + 2] === b;
    return found;
}"""


# Two frames: what the first draws or measures has been heard of when the second begins.
FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
# How many wheel events have come, counted from when this is first asked.
WHEELS = """() => {
    if (window.wheels === undefined) {
        window.wheels = 0;
        addEventListener("wheel", () => window.wheels++, { capture: true, passive: true });
    }
    return window.wheels;
}"""


class View:
    """A page in the browser, driven as a reader would."""

    def __init__(self, browser, path, **settings):
        settings = {"viewport": {"width": 1280, "height": 800}, **settings}
        self.page = browser.new_page(**settings)
        self.complaints = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self.requested)
        self.url = path.as_uri()

    def requested(self, request):
        if request.url != self.url and not request.url.startswith("blob:"):  # the worker
            self.complaints.append(f"requested {request.url}")

    def load(self):
        self.page.goto(self.url)
        return self.settle()

    def state(self):
        return self.page.evaluate("torchoptGraph.state()")

    def settle(self):
        """Wait until nothing is laid out and nothing moves; the tests' own limit is a minute."""
        for _ in range(1200):
            state = self.state()
            if not state["waiting"] and not state["inFlight"]:
                return state
            time.sleep(0.05)
        raise AssertionError(f"The page does not come to rest: {state}")

    def drawn(self):
        """Wait until the page has been drawn as it is now."""
        self.page.evaluate(FRAMES)

    def resize(self, width, height):
        """Give the window another size, and wait until the page has taken it."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.wait_for_function(
            "([w, h]) => innerWidth === w && innerHeight === h", arg=[width, height]
        )
        self.drawn()
        return self.settle()

    def wheel(self, x, y):
        """Turn the wheel, and wait until the page has moved."""
        before = self.page.evaluate(WHEELS)
        self.page.mouse.wheel(x, y)
        self.page.wait_for_function("n => window.wheels > n", arg=before)
        self.drawn()

    def click(self, key):
        self.page.mouse.click(*self.page.evaluate(f"torchoptGraph.place({key})"))
        return self.settle()

    def click_header(self, lane):
        self.page.mouse.click(*self.page.evaluate(f"torchoptGraph.header({lane})"))
        return self.settle()

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)
        return self.settle()

    def press_button(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()
        return self.settle()

    def panel(self):
        return self.page.inner_text("#panel-body")
