"""Drive headless Chromium over its DevTools pipe: no driver, no dependency, no network.

`Browser` starts one Chromium whose only proxy is a dead end, so that nothing outside the
machine can be reached; `Page` opens files, evaluates JavaScript, takes screenshots, and
keeps the list of every address that was asked for.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 180.0  # seconds for one answer: a loaded machine may take long
MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome: `$CHROMIUM`, the path, or the usual place on macOS."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return found or (MACOS if Path(MACOS).exists() else None)


def on_disk(url: str) -> bool:
    """Whether a `file:` address names a file that exists."""
    parts = urlsplit(url)
    return parts.scheme == "file" and Path(unquote(parts.path)).is_file()


class Browser:
    """A headless Chromium with the network cut; a context manager."""

    def __init__(self, executable: str | None = None):
        executable = executable or find_chromium()
        if executable is None:
            raise FileNotFoundError("no Chromium found: install chromium or set CHROMIUM")
        self.profile = tempfile.mkdtemp(prefix="gptbook-chromium-")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec 3<&{to_read} 4>&{to_write}; exec "$@"', "chromium",
             executable, "--remote-debugging-pipe", "--headless", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--disable-extensions", "--hide-scrollbars",
             "--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=<-loopback>",
             f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL)
        os.close(to_read), os.close(to_write)
        self._ids, self._buffer, self.events = itertools.count(1), b"", []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """End this browser and remove its profile."""
        try:
            self.send("Browser.close")
            self.process.wait(10)
        except Exception:
            self.process.kill()
            self.process.wait()
        os.close(self._write), os.close(self._read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def _receive(self, timeout: float) -> dict | None:
        """The next message, or None when `timeout` seconds brought none."""
        deadline = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return None
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise ConnectionError("Chromium ended unexpectedly")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, session: str | None = None, timeout=PATIENCE, **params) -> dict:
        """Call a DevTools method and return its result; events on the way are kept."""
        number = next(self._ids)
        call = {"id": number, "method": method, "params": params}
        if session:
            call["sessionId"] = session
        os.write(self._write, json.dumps(call).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self._receive(deadline - time.monotonic())
            if message is None:
                break
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)
        raise TimeoutError(f"{method}: no answer in {timeout} s")

    def wait(self, method: str, session: str, timeout=PATIENCE) -> dict:
        """Wait for an event of a session."""
        deadline = time.monotonic() + timeout
        seen = 0
        while time.monotonic() < deadline:
            for event in self.events[seen:]:
                if event.get("method") == method and event.get("sessionId") == session:
                    return event
            seen = len(self.events)
            message = self._receive(deadline - time.monotonic())
            if message is not None:
                self.events.append(message)
        raise TimeoutError(f"no {method} in {timeout} s")

    def page(self, width=1300, height=1000, scheme="light", script="") -> "Page":
        """A new tab; `script` runs before the page's own scripts."""
        return Page(self, width, height, scheme, script)


class Page:
    """One tab: `open`, `evaluate`, `screenshot`; `requests` lists what was asked for."""

    def __init__(self, browser, width, height, scheme, script):
        self.browser, self.width = browser, width
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.target = target
        self.session = browser.send("Target.attachToTarget", targetId=target,
                                    flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._send(f"{domain}.enable")
        self.resize(width, height)
        self._send("Emulation.setEmulatedMedia",
                   features=[{"name": "prefers-color-scheme", "value": scheme}])
        if script:
            self._send("Page.addScriptToEvaluateOnNewDocument", source=script)

    def resize(self, width: int, height: int):
        """Give the window another size."""
        self.width = width
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                   deviceScaleFactor=1, mobile=False)

    def _send(self, method, **params):
        return self.browser.send(method, self.session, **params)

    def open(self, url: str, settle: float = 0.2) -> "Page":
        """Load `url`, wait for its formulas, and let scripts and late requests settle.

        A page that sends the reader on, as the site's front door does, is followed."""
        self.browser.events = [e for e in self.browser.events
                               if e.get("sessionId") != self.session]
        self._send("Page.navigate", url=url)
        self.browser.wait("Page.loadEventFired", self.session)
        for attempt in range(3):
            try:
                self.evaluate("window.MathJax && MathJax.startup && MathJax.startup.promise "
                              "? MathJax.startup.promise.then(() => 1) : 1")
                time.sleep(settle)
                self.evaluate("1")
                return self
            except RuntimeError as error:  # it went on to another page meanwhile
                if "navigated" not in str(error) or attempt == 2:
                    raise

    def _events(self, method):
        return [e["params"] for e in self.browser.events
                if e.get("sessionId") == self.session and e.get("method") == method]

    @property
    def requests(self) -> list[str]:
        """Every address asked for since `open`, files included."""
        return [e["request"]["url"] for e in self._events("Network.requestWillBeSent")]

    @property
    def outside(self) -> list[str]:
        """The requests that would leave the machine."""
        inside = ("file:", "data:", "blob:", "about:", "chrome:")
        return [url for url in self.requests if not url.startswith(inside)]

    @property
    def errors(self) -> list[str]:
        """Uncaught JavaScript errors, and addresses that failed to load.

        A file that exists counts as loaded: Chromium refuses to *preload* fonts from
        `file:`, and loads them all the same when they are used."""
        thrown = [e["exceptionDetails"].get("exception", {}).get("description", "error")
                  for e in self._events("Runtime.exceptionThrown")]
        urls = {e["requestId"]: e["request"]["url"]
                for e in self._events("Network.requestWillBeSent")}
        failed = [(e["errorText"], urls.get(e["requestId"], "?"))
                  for e in self._events("Network.loadingFailed") if not e.get("canceled")]
        return thrown + [f"{text} {url}" for text, url in failed if not on_disk(url)]

    def evaluate(self, expression: str):
        """The value of a JavaScript expression (a promise is awaited)."""
        result = self._send("Runtime.evaluate", expression=expression, awaitPromise=True,
                            returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def screenshot(self, path: Path, top=0, height: int | None = None) -> Path:
        """A PNG of what a window of that height shows, scrolled to `top`."""
        full = self.evaluate("document.documentElement.scrollHeight")
        self.resize(self.width, min(height or full, 16000))
        self.evaluate(f"scrollTo({{top: {top}, behavior: 'instant'}})")
        time.sleep(0.1)
        data = self._send("Page.captureScreenshot")["data"]
        Path(path).write_bytes(base64.b64decode(data))
        return Path(path)

    def close(self):
        """Close the tab."""
        self.browser.send("Target.closeTarget", targetId=self.target)
