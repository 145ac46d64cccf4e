"""Use the page as a person does, in a real browser, and take the pictures of it that the notebook shows.

    python tests/browser.py [--model MODEL] [--out assets/figures/demo.png] [--example 0]

It wants playwright and a Chromium (CHROMIUM names one that is not in its usual place).
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def chromium():
    "Path of a Chromium, or None."
    names = os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"
    return next((path for name in names if name and (path := shutil.which(name))), None)


@functools.cache
def why_no_browser():
    "Why no page can be opened here, or None."
    if chromium() is None:
        return "no Chromium"
    try:
        done = subprocess.run(
            [chromium(), "--headless", *ARGUMENTS, "--dump-dom", "about:blank"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return "Chromium does not start in a minute"
    return None if "<html>" in done.stdout else f"Chromium does not start: {done.stderr.strip()[-300:]}"


class Page:
    "The demo in a browser, with the things that a person does on it as methods."

    def __init__(self, playwright, url, width=1280, height=1000):
        self.browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        self.page = self.browser.new_page(viewport=dict(width=width, height=height))
        self.page.set_default_timeout(60_000)
        self.foreign, self.faults = [], []
        self.page.on(
            "request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else self.foreign.append(r.url)
        )
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.page.goto(url)
        self.page.wait_for_selector("#edit", timeout=60_000)

    def click_example(self, row=0):
        example = self.page.locator("#examples button").nth(row)
        words = example.inner_text().strip()
        example.click()
        self.page.wait_for_function("t => document.querySelector('#instruction textarea').value == t", arg=words)
        self.page.wait_for_selector("#clip video", timeout=60_000)

    def upload(self, field, *paths):
        self.page.locator(f"#{field} input[type=file]").first.set_input_files([str(p) for p in paths])

    def open_tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()

    def instruct(self, text):
        self.page.locator("#instruction textarea").fill(text)

    def instruction(self):
        return self.page.locator("#instruction textarea").input_value()

    def set_steps(self, steps):
        self.page.locator("#steps input[type=number]").fill(str(steps))

    def click(self, name):
        self.page.locator(f"button#{name}").click()

    def edit(self):
        self.click("edit")

    def wait_for_text(self, field, text, seconds=180):
        self.page.wait_for_function(
            "([f, t]) => document.querySelector('#' + f)?.innerText.includes(t)",
            arg=[field, text],
            timeout=seconds * 1000,
        )
        return self.page.locator(f"#{field}").inner_text()

    def wait_for_result(self, kind="video", seconds=180):
        "The address of the result and the note below it."
        selector = "#result video" if kind == "video" else "#result-image img"
        note = self.wait_for_text("note", "edited at", seconds)
        self.page.wait_for_selector(selector, timeout=seconds * 1000)
        self.page.wait_for_selector("#strip img", timeout=seconds * 1000)
        return self.page.locator(selector).first.get_attribute("src"), note

    def look(self):
        "Ask where the denoiser looks, and wait for an answer that is not the one of the opening."
        self.click("look")
        self.page.wait_for_function(
            "(t => t.includes('self-attention') && !t.includes('“'))(document.querySelector('#guidance-text').innerText)"
        )

    def wait_for_comparison(self):
        "Names of the files that can be taken home."
        self.page.wait_for_selector("#wipe img")
        self.page.wait_for_selector("#heat img")
        self.page.wait_for_function(
            "document.querySelector('#downloads').textContent.replace(/\\s/g, '').includes('edit.py')"
        )
        return "".join(self.page.locator("#downloads").text_content().split())

    def plays(self):
        "Whether the result moves."
        self.page.wait_for_function("(v => v && v.readyState >= 2)(document.querySelector('#result video'))")
        return self.page.evaluate("""async () => { const v = document.querySelector('#result video'); v.muted = true; await v.play(); const at = v.currentTime;
            for (let i = 0; i < 100; i++) { await new Promise(r => setTimeout(r, 50)); if (v.currentTime != at) return true } return false }""")

    def wait_for_error(self, text):
        return self.page.locator(".toast-body", has_text=text).first.inner_text(timeout=60_000)

    def overflow(self):
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def shot(self, path):
        "A picture of the page in 256 colours."
        from PIL import Image

        self.page.wait_for_timeout(1500)
        self.page.screenshot(path=str(path), full_page=True)
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)

    def close(self):
        self.browser.close()


def pictures(page, out, example):
    "Through all tabs, with a picture of each."
    page.click_example(example)
    page.edit()
    note = page.wait_for_result()[1]
    page.wait_for_comparison()
    page.shot(out)
    beside = lambda name: out.with_name(f"{out.stem}-{name}.png")
    page.open_tab("Guidance")
    page.look()
    page.shot(beside("guidance"))
    page.open_tab("Data")
    page.click("pairs")
    page.wait_for_text("kept", "become quadruplets")
    page.page.wait_for_selector("#sheets img")
    page.shot(beside("data"))
    page.open_tab("Judge")
    page.click("take")
    page.page.wait_for_function(
        "document.querySelector('#judge-instruction textarea, #judge-instruction input').value.length > 0"
    )
    page.click("judge")
    page.wait_for_text("judgement", "of 5")
    page.shot(beside("judge"))
    return note


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "figures" / "demo.png")
    parser.add_argument("--example", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from playwright.sync_api import sync_playwright

    from kiwi_edit.apps.demo import close, launch

    served = launch("127.0.0.1", 0, options.model, block=False, say=print)
    try:
        with sync_playwright() as playwright:
            page = Page(playwright, served.local_url)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            print(
                pictures(page, options.out, options.example),
                f"foreign requests: {page.foreign}",
                f"faults: {page.faults}",
                sep="\n",
            )
            page.close()
            small = Page(playwright, served.local_url, 390, 844)
            small.shot(options.out.with_name(f"{options.out.stem}-small.png"))
            print(f"foreign requests: {small.foreign}", f"faults: {small.faults}", sep="\n")
            small.close()
    finally:
        close(served)


if __name__ == "__main__":
    main()
