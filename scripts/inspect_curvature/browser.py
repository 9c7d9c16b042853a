"""A headless Chromium, driven by its DevTools protocol over a pipe: no package, no port, no network."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


class Browser:
    """One page, as a context manager. events: every message of the protocol so far. Raises RuntimeError without a
    browser on PATH."""

    def __init__(self, width: int = 1366, height: int = 768) -> None:
        if CHROMIUM is None:
            raise RuntimeError("no chromium on PATH")
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 30) for end in (to_read, to_write)]
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder.name}", f"--window-size={width},{height}"]
        shell = f'exec "$@" 3<&{inherited[0]} 4>&{inherited[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=inherited,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_read, to_write, *inherited):
            os.close(end)
        self.events: list[dict[str, Any]] = []
        self._buffer, self._count = b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)
        os.close(self.write_end)
        os.close(self.read_end)
        self.folder.cleanup()

    def call(self, method: str, timeout: float = 60, **params: Any) -> dict[str, Any]:
        """Raises RuntimeError for what the browser refuses, TimeoutError."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        number, end = self._count, time.monotonic() + timeout
        while time.monotonic() < end:
            for found in self._messages(end - time.monotonic()):
                if found.get("id") == number:
                    if "error" in found:
                        raise RuntimeError(f"{method}: {found['error']}")
                    return found["result"]
        raise TimeoutError(method)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def open(self, path: Path, wait_for: str = "true", timeout: float = 60) -> None:
        """Loads a file and waits until an expression is true."""
        self.call("Page.navigate", url=f"file://{path.resolve()}")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            time.sleep(0.1)
            if self.evaluate(f"document.readyState === 'complete' && Boolean({wait_for})"):
                return
        raise TimeoutError(f"{path}: {wait_for}")

    def emulate(self, scheme: str) -> None:
        """scheme: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path, **clip: float) -> None:
        """clip: x, y, width, height in pixels of the page; default: what is in view."""
        more: dict[str, Any] = {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True} if clip else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **more)["data"]))

    def said(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of all events of these methods."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def _messages(self, timeout: float) -> Iterator[dict[str, Any]]:
        """Waits for some; keeps the events, yields the answers."""
        ready, _, _ = select.select([self.read_end], [], [], max(0.0, timeout))
        if not ready:
            return
        chunk = os.read(self.read_end, 1 << 20)
        if not chunk:
            raise RuntimeError("the browser has gone")
        *whole, self._buffer = (self._buffer + chunk).split(b"\0")
        for raw in whole:
            message = json.loads(raw)
            if "method" in message:
                self.events.append(message)
            else:
                yield message
