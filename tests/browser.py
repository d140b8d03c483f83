"""Headless Chromium over its debugging pipe, with JavaScript off: what a person could do with a keyboard."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiers import missing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH, HEIGHT = 1200, 900
PATIENCE = 120  # seconds


class Browser:
    """One page of a running browser."""

    def __init__(self, reading: int, writing: int) -> None:
        self._in, self._out = reading, os.fdopen(writing, "wb", buffering=0)
        self._read = b""
        self._number = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setScriptExecutionDisabled", value=True)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], PATIENCE)
            assert ready, f"the browser has said nothing for {PATIENCE} s"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser is gone"
            self._read += part
        first, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message

    def send(self, method: str, **parameters: Any) -> Any:
        """The result of a command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def _loaded(self) -> None:
        while all(one.get("method") != "Page.loadEventFired" for one in self._events):
            self._events.append(self._message())
        self._events.clear()

    def open(self, url: str) -> None:
        self._events.clear()
        self.send("Page.navigate", url=url)
        self._loaded()

    def type(self, text: str) -> None:
        """Into the field that has the focus, ended by Enter; waits for the page that follows."""
        self._wait_until_ready()
        self.send("Input.insertText", text=text)
        self._events.clear()
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r")
        self._loaded()

    def _wait_until_ready(self) -> None:
        """Until a text field has the focus. Both `autofocus` and keys need the page's first frame, which may be late.

        A key that comes before that frame is lost, and with it the page to wait for; a picture forces the frame.
        """
        self.send("Page.captureScreenshot")
        end = time.monotonic() + PATIENCE
        while not any(_is_focused_field(node) for node in self.send("Accessibility.getFullAXTree")["nodes"]):
            assert time.monotonic() < end, "no text field has the focus"
            time.sleep(0.05)

    def text(self) -> str:
        """The page as its accessibility tree reads."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return "\n".join(str(node["name"].get("value", "")) for node in nodes if node.get("name"))

    def picture(self, path: Path) -> bytes:
        """A PNG of the window."""
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data


def _is_focused_field(node: dict[str, Any]) -> bool:
    focused = any(one["name"] == "focused" and one["value"].get("value") for one in node.get("properties", []))
    return focused and node.get("role", {}).get("value") == "textbox"


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`. Skips where there is no Chromium."""
    if CHROMIUM is None:
        missing("browser", "no Chromium on this machine: apt-get install chromium")
    to_browser, writing = os.pipe()
    reading, from_browser = os.pipe()

    def as_three_and_four() -> None:
        spare = os.dup(from_browser)  # it may be 3 itself
        os.dup2(to_browser, 3)
        os.dup2(spare, 4)
        for pipe in (3, 4):  # dup2 leaves a descriptor that has its number already as it was: closed on exec
            os.set_inheritable(pipe, True)

    command = [
        *(CHROMIUM, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{HEIGHT}"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, close_fds=False,
        preexec_fn=as_three_and_four, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(reading, writing)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(reading)
