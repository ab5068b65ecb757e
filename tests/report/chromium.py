"""A headless Chromium that opens one page, spoken to through its debugging pipe: no port, no package."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from select import select
from typing import Any

#: Where it may be.
BROWSER = os.environ.get("SPECKD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
        "--hide-scrollbars",
    ),
)


class Page:
    """One page in one browser. `events`: what it told of the console, of exceptions and of requests, until now."""

    def __init__(self, place: Path) -> None:
        assert BROWSER is not None
        self._profile = tempfile.mkdtemp(dir=place)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The pipe is its file 3 and 4; a shell puts them there, for Python would need a fork of its own to do so.
        moved = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, BROWSER, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.events: list[dict[str, Any]] = []
        self._waiting, self._number, self._session = b"", 0, ""
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def size(self, width: int, height: int, dark: bool = False, touch: bool = False) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.media(dark)

    def media(self, dark: bool = False, printed: bool = False) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", media="print" if printed else "", features=scheme)

    def open(self, page: Path) -> None:
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._until(lambda event: event.get("method") == "Page.loadEventFired")

    def ask(self, expression: str) -> Any:
        """A value of the page's document; the page itself runs no script."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point_at(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press_tab(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    def picture(self, to: Path, whole: bool = False) -> None:
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        to.write_bytes(base64.b64decode(found["data"]))

    def wait(self, seconds: float) -> None:
        """Hears what the page still has to say."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._hear(left)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda event: event.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _until(self, wanted: Any) -> dict[str, Any]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for event in self._hear(end - time.monotonic()):
                if wanted(event):
                    return event
        raise TimeoutError("the browser did not answer")

    def _hear(self, seconds: float) -> list[dict[str, Any]]:
        ready, _, _ = select([self._read], [], [], max(0.0, seconds))
        if not ready:
            return []
        data = os.read(self._read, 1 << 20)
        if not data:
            raise ConnectionError(f"the browser ended with code {self._process.poll()}")
        *whole, self._waiting = (self._waiting + data).split(b"\0")
        found = [json.loads(one) for one in whole]
        self.events += [event for event in found if "method" in event]
        return found
