"""A real browser that opens pages: Debian's Chromium, driven by Playwright."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright


@dataclass
class Visit:
    """An open page, and what happened in it."""

    page: Page
    messages: list[str] = field(default_factory=list)
    """What was written to the console, errors included."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, except the page's own and what it has inline."""

    def sideways(self) -> int:
        """By how many pixels the page is wider than the screen."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def clipped(self) -> list[str]:
        """Texts of pictures that reach beyond their picture."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll("svg.plot")].flatMap(svg => {
                const outer = svg.getBoundingClientRect();
                return [...svg.querySelectorAll("text")].filter(text => {
                    const own = text.getBoundingClientRect();
                    return own.left < outer.left - 1 || own.right > outer.right + 1
                        || own.top < outer.top - 1 || own.bottom > outer.bottom + 1;
                }).map(text => text.textContent);
            })"""
        )


def missing_browser() -> str | None:
    """Why there is no browser, or None."""
    return None if shutil.which("chromium") else "no chromium; apt-get install chromium"


@contextlib.contextmanager
def run_browser() -> Iterator[Browser]:
    """Start the browser, and end it after the block."""
    with sync_playwright() as playwright:
        # Root may not start it with its sandbox.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(
    browser: Browser, path: Path, *, width: int = 1280, scheme: str = "light", scripts: bool = True
) -> Iterator[Visit]:
    """Open a file as a reader does: on a screen this wide, light or dark, with or without JavaScript."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
    )
    page = context.new_page()
    found = Visit(page)
    page.on("console", lambda message: found.messages.append(message.text))
    page.on("pageerror", lambda error: found.messages.append(str(error)))
    page.on("dialog", lambda dialog: (found.messages.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(path.absolute().as_uri())
    own = {path.absolute().as_uri()}
    found.requests = [url for url in found.requests if url not in own and not url.startswith("data:")]
    yield found
    context.close()
