"""Pages in headless Chromium, over its DevTools: see scripts/pages.sh."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

WIDTHS, SCHEMES = (1200, 400), ("light", "dark")
SERIOUS = ("serious", "critical")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPEN = "for (const d of document.querySelectorAll('details')) d.open = true"
FINDINGS = """axe.run().then((r) => r.violations.map((v) =>
  ({id: v.id, impact: v.impact, count: v.nodes.length, first: v.nodes[0].html.slice(0, 200)})))"""


class Tab:
    """One page of the browser; `complaints` are what its console has said since it was opened."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.number = socket, 0
        self.complaints: list[str] = []

    async def call(self, method: str, **params: Any) -> Any:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self.number:
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(message["params"]["exceptionDetails"]["text"])
            if message.get("method") == "Log.entryAdded":
                self.complaints.append(message["params"]["entry"]["text"])

    async def evaluate(self, script: str) -> Any:
        """The value of a script, waited for; what it throws is a complaint."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            self.complaints.append(found["exceptionDetails"]["text"])
        return found["result"].get("value")


async def look(tab: Tab, page: Path, axe: str, out: Path | None) -> bool:
    """Whether a page is in order at all widths and in both schemes; says what is not."""
    good = True
    for scheme in SCHEMES:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await tab.call("Emulation.setEmulatedMedia", features=features)
        for width in WIDTHS:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            await tab.call("Emulation.setDeviceMetricsOverride", **size)
            tab.complaints.clear()
            await tab.call("Page.navigate", url=page.resolve().as_uri())
            while await tab.evaluate("document.readyState") != "complete":
                await asyncio.sleep(0.1)
            if out:
                shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=False)
                (out / f"{page.stem}-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
            await tab.evaluate(OPEN)
            wide = await tab.evaluate("document.documentElement.scrollWidth - innerWidth")
            await tab.evaluate(f"{axe};0")
            findings = await tab.evaluate(FINDINGS)
            serious = [f for f in findings if f["impact"] in SERIOUS]
            print(f"{page} {width} {scheme}: {len(serious)} serious of {len(findings)} findings")
            for line in (*map(json.dumps, findings), *tab.complaints):
                print(f"  {line}")
            if wide > 0:
                print(f"  {wide} pixels wider than the screen")
            good &= not (serious or tab.complaints or wide > 0)
    return good


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js")
    parser.add_argument("--out", type=Path, help="directory for screenshots of what shows first")
    parser.add_argument("pages", type=Path, nargs="+")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = (
            f"--headless=new --no-sandbox --disable-gpu --remote-debugging-port=0 --user-data-dir={profile}"
        )
        process = subprocess.Popen([browser, *options.split(), "about:blank"], stderr=subprocess.DEVNULL)
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            while not (port_file.is_file() and port_file.read_text().count("\n")):
                await asyncio.sleep(0.1)
            port = port_file.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                tabs = await (await session.get(f"http://127.0.0.1:{port}/json")).json()
                address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    tab = Tab(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await tab.call(f"{domain}.enable")
                    good = [await look(tab, page, args.axe.read_text(), args.out) for page in args.pages]
        finally:
            process.terminate()
            process.wait()
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
