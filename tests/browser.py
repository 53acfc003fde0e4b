"""Headless Chromium, driven over a pipe: what a page loads, says and measures, and pictures of it.

    python tests/browser.py output/demo/report.html docs/report.png --width 1100 --height 1400

takes a picture of a page for the documentation.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page of a browser.

    Attributes:
        requests: addresses that were asked for, data URIs left out.
        errors: what the console and the page reported.
    """

    def __init__(self, commands, answers) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._session = 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []

    def call(self, method: str, **params) -> dict:
        """A command of the DevTools protocol; events that come before its answer are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self) -> dict:
        content = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            content += byte
        message = json.loads(content)
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.errors.append(f"{params['entry']['text']} ({params['entry'].get('url')})")
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(str(params["args"]))
        return message

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def open(self, address: str, width: int, height: int = 800) -> None:
        """Load a page, with its pictures, into a viewport of so many pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + 60
        while self.evaluate("document.readyState + location.href.slice(0, 5)") != "complete" + address[:5]:
            if time.monotonic() > deadline:
                raise TimeoutError(address)
            time.sleep(0.05)

    def evaluate(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self) -> bytes:
        """A PNG of the viewport."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def open_page() -> Iterator[Page]:
    """A blank page of a new browser."""
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads file descriptor 3 and writes 4.
        command = (
            f'exec "$0" --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$1" '
            f"--remote-debugging-pipe 3<&{to_browser[0]} 4>&{from_browser[1]}"
        )
        browser = subprocess.Popen(
            ["bash", "-c", command, find_chromium(), profile],
            pass_fds=[to_browser[0], from_browser[1]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        with os.fdopen(to_browser[1], "wb") as commands, os.fdopen(from_browser[0], "rb") as answers:
            try:
                page = Page(commands, answers)
                page.attach()
                yield page
            finally:
                browser.terminate()
                browser.wait(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1400)
    parser.add_argument("--scroll", type=int, default=0, help="pixels from the top")
    args = parser.parse_args()
    with open_page() as page:
        page.open(args.page.resolve().as_uri(), args.width, args.height)
        page.evaluate(f"window.scrollTo(0, {args.scroll})")
        args.picture.write_bytes(page.screenshot())


if __name__ == "__main__":
    main()
