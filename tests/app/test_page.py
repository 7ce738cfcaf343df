"""What people do on the page, in Chromium."""

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.xdist_group("app")  # one app for all
COLOURS = {"red": (220, 30, 30), "blue": (30, 40, 220), "white": (240, 240, 240)}
SHOTS = os.environ.get("PERDURE_SHOTS")
"""A folder for screenshots, to be looked at."""


@pytest.fixture
def opened(app: Any, new_context: Any) -> Iterator[Callable[..., Page]]:
    """Opens the page in a browser of its own; nothing but the app may be asked for anything, nor fail in it."""
    asked: set[str] = set()
    errors: list[str] = []

    def opening(**options: Any) -> Page:
        page: Page = new_context(**{"locale": "en-GB"} | options).new_page()
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(app.address)
        expect(page.get_by_text("Pictures" if options.get("locale") is None else "图片").first).to_be_visible()
        return page

    yield opening
    elsewhere = {url for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert {urlsplit(url).netloc for url in elsewhere} == {urlsplit(app.address).netloc}
    assert errors == []


def shot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def picture(folder: Path, colour: str, seed: int = 3) -> str:
    noisy = np.array(COLOURS[colour]) + np.random.default_rng(seed).normal(0, 12, (24, 24, 3))
    path = folder / f"{colour}-{seed}.png"
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
    return str(path)


def give(page: Page, where: str, *files: str) -> None:
    page.locator(f"#{where} input[type=file]").set_input_files(list(files))
    for file in files:
        expect(page.locator(f"#{where}").get_by_text(Path(file).stem).first).to_be_visible()


def look(page: Page, *files: str) -> Any:
    give(page, "look-at", *files)
    page.locator("#look").click()
    return page.locator("#answers .perdure-card")


def settle(page: Page) -> None:
    """Wait until what moves has arrived, and the page has been laid out since."""
    page.evaluate(
        """async () => {
            const ending = document.getAnimations().filter(each => each.effect.getComputedTiming().endTime < Infinity)
            await Promise.allSettled(ending.map(each => each.finished))
            for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame)
        }"""
    )


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def test_pictures_are_predicted_with_a_bar_for_each_class(opened: Any, tmp_path: Path) -> None:
    page = opened()
    found = look(page, picture(tmp_path, "red"), picture(tmp_path, "red", 4))
    expect(found).to_have_count(2)
    for i in range(2):
        expect(found.nth(i).locator(".perdure-bar").first).to_contain_text("red")
    shot(page, "predict")


def test_a_folder_is_searched_by_a_picture_and_by_words(opened: Any, tmp_path: Path) -> None:
    page = opened()
    tab(page, "Search")
    give(page, "like", picture(tmp_path, "blue"))
    page.locator("#find").click()
    found = page.locator("#found .perdure-card")
    expect(found).to_have_count(6)
    expect(found.first).to_contain_text("blue/")
    shot(page, "search")
    again = opened()
    tab(again, "Search")
    again.locator("#words textarea, #words input").first.fill("something red")
    again.locator("#find").click()
    expect(again.locator("#found .perdure-card")).to_have_count(6)


def test_a_file_that_is_no_picture_is_refused_by_name(opened: Any, tmp_path: Path) -> None:
    page = opened()
    bad = tmp_path / "holiday.png"
    bad.write_text("no picture")
    look(page, str(bad))
    expect(page.get_by_text("cannot read image holiday.png: not an image")).to_be_visible()
    shot(page, "bad-file")


def test_new_classes_are_taught_and_then_predicted_also_in_another_browser(opened: Any, tmp_path: Path) -> None:
    page, other = opened(), opened()
    tab(page, "Teach")
    for colour in ("blue", "white"):
        give(page, "to-learn", *(picture(tmp_path, colour, seed) for seed in range(6)))
        page.locator("#class textarea, #class input").first.fill(colour)
        page.locator("#collect").click()
        expect(page.locator("#collected")).to_contain_text(f"{colour} (6)")
    page.locator("#learn").click()
    expect(page.locator("#progress")).to_contain_text("Learnt in")
    expect(page.locator("#progress")).to_contain_text("What was forgotten")
    expect(page.locator("#progress svg polyline")).to_be_visible()
    shot(page, "teach")
    tab(page, "Predict")
    for each in (page, other):
        expect(look(each, picture(tmp_path, "white", 9)).locator(".perdure-bar").first).to_contain_text("white")


def test_an_archive_that_leads_out_of_its_folder_teaches_nothing(opened: Any, app: Any, tmp_path: Path) -> None:
    page = opened()
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as packed:
        packed.write(picture(tmp_path, "red"), "../../outside/red.png")
    tab(page, "Teach")
    give(page, "archive", str(evil))
    page.locator("#learn").click()
    expect(page.get_by_text("leads out of it")).to_be_visible()
    assert not list(app.folder.parent.rglob("outside"))


@pytest.mark.parametrize("name", ["Predict", "Search", "Teach", "Report"])
def test_nothing_is_wider_than_a_telephone(opened: Any, tmp_path: Path, name: str) -> None:
    page = opened(viewport={"width": 420, "height": 800})
    settle(page)  # which tabs do not fit shows only then
    if name == "Predict":
        expect(look(page, picture(tmp_path, "red"))).to_have_count(1)
    elif not page.get_by_role("tab", name=name, exact=True).is_visible():
        page.locator(".overflow-menu button").first.click()  # tabs that do not fit
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
    else:
        tab(page, name)
    if name == "Report":
        expect(page.frame_locator("#report-frame iframe").get_by_text("january").first).to_be_visible()
    settle(page)
    shot(page, f"narrow-{name}")
    page.wait_for_function("document.documentElement.scrollWidth <= 420")


def test_a_chinese_browser_is_answered_in_chinese(opened: Any) -> None:
    page = opened(locale="zh-CN")
    tab(page, "教学")
    expect(page.get_by_role("button", name="开始教学")).to_be_visible()
    page.locator("#learn").click()
    expect(page.locator(".toast-body").get_by_text("没有可学的内容")).to_be_visible()
    shot(page, "chinese")


def test_the_report_is_shown_within_the_page(opened: Any) -> None:
    page = opened()
    tab(page, "Report")
    expect(page.frame_locator("#report-frame iframe").get_by_text("january").first).to_be_visible()
    shot(page, "report")
