"""The page of a learner that answers in words, which is made by its first lesson; and the grids beside it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.xdist_group("app")  # one app for all


@pytest.fixture(scope="module")
def speaking(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, lab: Any) -> Any:
    folder = tmp_path_factory.mktemp("speaking")
    for method in ("probe", "ncm"):
        lab.but(tasks=2).run(method, folder / "runs" / "grid" / method)
    return start(folder, "--backbone", "tiny_mllm()", "--runs", "runs")


def pictures(folder: Path) -> list[str]:
    for colour in ("red", "green"):
        Image.new("RGB", (28, 28), colour).save(folder / f"{colour}.png")
    return [str(folder / f"{colour}.png") for colour in ("red", "green")]


def test_questions_are_taught_asked_and_talked_about(speaking: Any, new_context: Any, tmp_path: Path) -> None:
    page: Page = new_context(locale="en-GB").new_page()
    page.goto(speaking.address)
    expect(page.get_by_text("It has learnt nothing yet")).to_be_visible()
    page.get_by_role("tab", name="Teach", exact=True).click()
    page.locator("#to-learn input[type=file]").set_input_files(pictures(tmp_path))
    expect(page.locator("#to-learn").get_by_text("green")).to_be_visible()
    page.locator("#pairs textarea").fill("Which colour? | red\nWhich colour? | green")
    page.locator("#learn").click()
    expect(page.locator("#progress")).to_contain_text("Learnt in")
    with httpx.Client(base_url=speaking.address, timeout=60, trust_env=False) as client:
        images = [("images", ("red.png", (tmp_path / "red.png").read_bytes()))]
        asked = client.post("/api/ask", data={"question": "Which colour?"}, files=images).json()
    page.get_by_role("tab", name="Ask", exact=True).click()
    page.locator("#ask-about input[type=file]").set_input_files(str(tmp_path / "red.png"))
    expect(page.locator("#ask-about").get_by_text("red")).to_be_visible()
    page.locator("#question textarea, #question input").first.fill("Which colour?")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#answer textarea, #answer input").first).to_have_value(asked["answer"])
    page.get_by_role("tab", name="Chat", exact=True).click()
    for number in (1, 2):
        page.locator("#line textarea, #line input").first.fill("Which colour?")
        page.locator("#send").click()
        expect(page.locator("#lines [data-testid=bot]")).to_have_count(number)
        expect(page.locator("#line textarea, #line input").first).to_have_value("")  # else it would take the next one
    page.locator("#line textarea, #line input").first.fill("Is a < b, or <b>bold</b>?")
    page.locator("#send").click()
    expect(page.locator("#lines [data-testid=user]").nth(2)).to_have_text("Is a < b, or <b>bold</b>?")
    if folder := os.environ.get("PERDURE_SHOTS"):
        page.screenshot(path=f"{folder}/chat.png", full_page=True)


def test_a_grid_is_compared_in_a_table_and_its_report(speaking: Any, new_context: Any) -> None:
    page: Page = new_context(locale="en-GB").new_page()
    page.goto(speaking.address)
    page.get_by_role("tab", name="Compare", exact=True).click()
    expect(page.locator("#grid input")).to_have_value("grid")  # as its folder is called
    for method in ("probe", "ncm"):
        expect(page.locator("#table").get_by_text(method, exact=True)).to_be_visible(timeout=20_000)
    expect(page.frame_locator("#plots iframe").get_by_text("probe").first).to_be_visible(timeout=20_000)
    if folder := os.environ.get("PERDURE_SHOTS"):
        page.screenshot(path=f"{folder}/compare.png", full_page=True)
