"""Use the page as a person does, in a real browser, and take the picture of it that the notebook shows.

    python tests/browser.py [--model MODEL] [--out assets/figures/demo.png] [--upload]

It wants playwright and a Chromium (CHROMIUM names one that is not in its usual place).
"""
import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def chromium():
    "Path of a Chromium, or None."
    names = os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"
    return next((path for name in names if name and (path := shutil.which(name))), None)


class Page:
    "The demo in a browser, with the things that a person does on it as methods."

    def __init__(self, playwright, url, width=1280, height=1000):
        self.browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        self.page = self.browser.new_page(viewport=dict(width=width, height=height))
        self.foreign, self.faults = [], []
        self.page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else self.foreign.append(r.url))
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.goto(url)
        self.page.wait_for_selector("#edit", timeout=30_000)

    def click_example(self, row=0):
        self.page.locator("#examples tbody tr").nth(row).click()
        self.page.wait_for_function("document.querySelector('#instruction textarea').value.length > 0")
        self.page.wait_for_selector("#clip video", timeout=15_000)

    def upload(self, field, *paths):
        self.page.locator(f"#{field} input[type=file]").first.set_input_files([str(p) for p in paths])

    def open_tab(self, name): self.page.get_by_role("tab", name=name, exact=True).click()

    def instruct(self, text): self.page.locator("#instruction textarea").fill(text)

    def set_steps(self, steps): self.page.locator("#steps input[type=number]").fill(str(steps))

    def edit(self): self.page.locator("button#edit").click()

    def wait_for_result(self, kind="video", seconds=180):
        "The address of the result and the note below it."
        selector = "#result video" if kind == "video" else "#result-image img"
        self.page.wait_for_selector(selector, timeout=seconds * 1000)
        self.page.wait_for_selector("#strip img", timeout=seconds * 1000)
        self.page.wait_for_function("document.querySelector('#note') && document.querySelector('#note').innerText.includes('edited at')", timeout=seconds * 1000)
        return self.page.locator(selector).first.get_attribute("src"), self.page.locator("#note").inner_text()

    def wait_for_error(self): return self.page.locator(".toast-body.error").first.inner_text(timeout=60_000)

    def close(self): self.browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "figures" / "demo.png")
    parser.add_argument("--example", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from playwright.sync_api import sync_playwright

    from kiwi_edit.demo import launch

    served = launch("127.0.0.1", 0, options.model, block=False, say=print)
    try:
        with sync_playwright() as playwright:
            page = Page(playwright, served.local_url)
            page.click_example(options.example)
            page.edit()
            source, note = page.wait_for_result()
            page.page.wait_for_timeout(1500)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            page.page.screenshot(path=str(options.out), full_page=True)
            print(note, f"foreign requests: {page.foreign}", f"faults: {page.faults}", options.out, sep="\n")
            page.close()
    finally:
        served.close()


if __name__ == "__main__":
    main()
