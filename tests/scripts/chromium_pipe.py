"""A headless Chromium, driven by its DevTools protocol over a pipe: no package, no port, no network."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

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
    """One page. events: everything it has said so far."""

    def __init__(self, width=1366, height=768):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 30) for end in (to_read, to_write)]
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder.name}", f"--window-size={width},{height}"]
        shell = f'exec "$@" 3<&{inherited[0]} 4>&{inherited[1]}'
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["bash", "-c", shell, "bash", *command], pass_fds=inherited, **quiet)
        for end in (to_read, to_write, *inherited):
            os.close(end)
        self.events, self._buffer, self._count, self._session = [], b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(10)
        os.close(self.write_end)
        os.close(self.read_end)
        self.folder.cleanup()

    def call(self, method, timeout=60, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
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

    def evaluate(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def open(self, path, wait_for="true", timeout=60):
        """Loads a file and waits until an expression is true."""
        self.call("Page.navigate", url=f"file://{path}")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            time.sleep(0.1)
            if self.evaluate(f"document.readyState === 'complete' && Boolean({wait_for})"):
                return
        raise TimeoutError(f"{path}: {wait_for}")

    def emulate(self, scheme):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path, **clip):
        import base64

        more = {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True} if clip else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **more)["data"]))

    def said(self, *methods):
        return [event["params"] for event in self.events if event.get("method") in methods]

    def _messages(self, timeout):
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
