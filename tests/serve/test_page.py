"""The page, used in headless Chromium as a person would use it.

Skipped where Playwright's Python package or a Chromium is missing: `pip install playwright`, and a `chromium` or
`google-chrome` on the PATH or what `playwright install chromium-headless-shell` fetches, are enough.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from overlap import AsyncEngine
from overlap.serve import serving
from overlap.serve.page import PAGE_ROUTES

WITHIN_MS = 60_000
"""How long a browser may take on a busy machine."""
ANSWER = "#log .answer .text"


@dataclass
class Visit:
    """A browser's page, and what went on in it."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    async def until(self, script: str) -> None:
        """Look again and again. (Playwright's own way evaluates inside the page, which its policy forbids.)"""
        async with asyncio.timeout(WITHIN_MS / 1000):
            while not await self.page.evaluate(script):
                await asyncio.sleep(0.05)

    async def settings(self, **values: str) -> None:
        await self.page.click("summary")
        for name, value in values.items():
            await self.page.fill(f"#{name}", value)

    async def ask(self, prompt: str) -> None:
        await self.page.fill("#prompt", prompt)
        await self.page.press("#prompt", "Enter")

    async def stop_behind(self, length: int) -> None:
        """Have Stop clicked as soon as an answer is longer: a click from here may come when it has ended."""
        script = """([answer, length]) => {
            const log = document.querySelector("#log");
            const look = new MutationObserver(() => {
                if ((log.querySelector(answer)?.textContent.length ?? 0) <= length) return;
                look.disconnect();
                document.querySelector("#stop").click();
            });
            look.observe(log, {subtree: true, childList: true, characterData: true});
        }"""
        await self.page.evaluate(script, [".answer .text", length])

    async def until_idle(self) -> None:
        await self.until("document.querySelector('#stop').hidden")


@pytest.fixture
async def engine(tiny_llama_dir: Path) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_llama_dir, device="cpu", dtype="float32", max_rows=4) as engine:
        yield engine


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    playwright = pytest.importorskip("playwright.async_api", reason="Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    async with playwright.async_playwright() as started:
        try:
            browser = await started.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root, in containers
        except playwright.Error as error:
            if path is not None or "playwright install" not in str(error):
                raise  # there is one, and it does not start
            pytest.skip("no Chromium is installed: `playwright install chromium-headless-shell` fetches one")
        yield browser
        await browser.close()


async def visit(browser: Any, address: str, **options: Any) -> Visit:
    context = await browser.new_context(**options)
    context.set_default_timeout(WITHIN_MS)
    page = await context.new_page()
    visit = Visit(page)
    page.on("console", lambda line: visit.complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.on("request", lambda request: visit.hosts.add(urlsplit(request.url).netloc))
    await page.goto(address)
    return visit


async def no_page_is_left(engine: AsyncEngine) -> None:
    async with asyncio.timeout(10):
        while True:
            figures = engine.statistics()
            if figures.num_pages == figures.free_pages + figures.evictable_pages and not figures.running:
                return
            await asyncio.sleep(0.01)


async def test_a_message_streams_its_answer_stop_ends_it_and_figures_move(engine: AsyncEngine, browser: Any) -> None:
    async with serving(engine, port=0, model_name="tiny") as address:
        one = await visit(browser, address)
        await one.settings(limit="12", temperature="0", system="Be brief.")
        await one.ask("How many tokens are there?")
        await one.until_idle()
        told = await one.page.text_content("#log .answer .meta")
        assert re.match(r"\d+ tokens? · \d+\.\d{3} s to the first", told), told
        said = [("system", "Be brief."), ("user", "How many tokens are there?")]
        messages = [{"role": role, "content": content} for role, content in said]
        body = {"model": "tiny", "temperature": 0, "max_tokens": 12, "messages": messages}
        async with aiohttp.ClientSession() as http, http.post(f"{address}/v1/chat/completions", json=body) as response:
            whole = (await response.json())["choices"][0]["message"]["content"]
        assert await one.page.text_content(ANSWER) == whole

        await one.page.click("#new")
        assert not await one.page.query_selector("#log article")
        await one.page.fill("#limit", "400")
        before = engine.statistics().tokens_out
        await one.stop_behind(4)
        await one.ask("Go on for a long time.")
        await one.until_idle()
        assert "stopped" in (await one.page.text_content("#log .answer .meta") or "")
        await no_page_is_left(engine)
        assert engine.statistics().tokens_out - before < 400
        await one.until(
            "[...document.querySelectorAll('#figures polyline')].filter(l => l.points.length > 1).length > 2"
        )
        assert await one.page.text_content("#status") == "Serving"
        assert one.complaints == []
        assert one.hosts == {urlsplit(address).netloc}


async def test_text_is_shown_as_text_and_code_as_code(engine: AsyncEngine, browser: Any) -> None:
    async with serving(engine, port=0, model_name="tiny") as address:
        one = await visit(browser, address, viewport={"width": 400, "height": 700})
        await one.settings(limit="1")
        await one.page.fill("#prompt", "<img src=x onerror=alert(1)>\n```python\n<b>a</b>\n    b\n```\nand on")
        await one.page.press("#prompt", "Enter")
        await one.until_idle()
        question = one.page.locator("#log .question .text")
        assert await question.locator("p").all_text_contents() == ["<img src=x onerror=alert(1)>\n", "and on"]
        assert await question.locator("pre").all_text_contents() == ["<b>a</b>\n    b"]
        assert await question.locator("img, b").count() == 0
        wide = await one.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 400, "nothing sticks out of a narrow window"
        assert one.complaints == []


async def test_a_server_with_a_key_is_asked_with_it(engine: AsyncEngine, browser: Any) -> None:
    async with serving(engine, port=0, model_name="tiny", api_key="secret") as address:
        one = await visit(browser, address)
        await one.until("!document.querySelector('#keyrow').hidden")
        await one.page.fill("#key", "secret")
        await one.until("document.querySelector('#status').textContent === 'Serving'")
        await one.settings(limit="2")
        await one.ask("Hello")
        await one.until_idle()
        assert "token" in (await one.page.text_content("#log .answer .meta") or "")
        assert await one.page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        assert all("401" in line for line in one.complaints), one.complaints


async def test_the_page_may_load_and_ask_nothing_from_elsewhere(engine: AsyncEngine) -> None:
    async with serving(engine, port=0) as address, aiohttp.ClientSession(address) as http:
        for path, _, content_type in PAGE_ROUTES.values():
            async with http.get(path) as response:
                assert response.status == 200
                assert response.content_type == content_type
                policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
                assert policy["default-src"] == "'none'"
                assert set(policy.values()) == {"'none'", "'self'"}
                assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_the_pages_files_name_no_other_host_and_write_no_markup() -> None:
    for _, name, _ in PAGE_ROUTES.values():
        text = files("overlap.serve").joinpath("page", name).read_text(encoding="utf-8")
        named = set(re.findall(r"https?://[^\s\"'<>]+", text))
        assert named <= {"http://www.w3.org/2000/svg"}, f"{name} names {named}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|style=|onclick=", text)
