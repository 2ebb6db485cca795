"""The page to look at: contrast, long names, small screens, and the keyboard."""

import copy
from pathlib import Path

import pytest
from space_demo import space_app

pytest.importorskip("gradio", reason="the Space needs gradio")

TABS = ("Concept explorer", "Explain", "Retrieve", "Compare models", "About")
CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8").split("\n", 1)[1]
PHONE = {"viewport": {"width": 390, "height": 844}}


class LongNames:
    """A model's data in which every latent has a long name, with and without places to break it."""

    @staticmethod
    def of(data):
        named = copy.copy(data)
        named.name = lambda latent: ("a name of many words " * 4 if latent % 2 else "Unbreakablename" * 5).strip()
        return named


@pytest.fixture(scope="module")
def data(small_space):
    return small_space


@pytest.fixture(scope="module", params=["own names", "long names"])
def names(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def url(data, names):
    shown = data if names == "own names" else LongNames.of(data)
    blocks = space_app().launch(shown, prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close()


def opened(page, name: str) -> None:
    """Open a tab and fill it."""
    page.get_by_role("tab", name=name).click()
    if name == "Concept explorer":
        page.wait_for_selector("#samples img.heat")
    elif name == "Explain":
        page.locator("#explain-strip button").nth(2).click()
        page.wait_for_selector("#explanation img.heat")
    elif name == "Retrieve":
        page.fill("#retrieve-caption textarea", "a red circle")
        page.click("#retrieve-button")
        page.wait_for_selector("#matches article")
    elif name == "Compare models":
        page.wait_for_selector("#comparison svg a[data-latent]")
    else:
        page.wait_for_selector("#card table")
    page.wait_for_timeout(600)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_word_stands_out(visit, theme, names):
    if names == "long names":
        pytest.skip("names have no colours of their own")
    page = visit(f"?__theme={theme}", color_scheme=theme)
    page.get_by_role("tab", name="Explain").click()
    page.wait_for_timeout(600)
    found = {"Explain, before anything is given": page.evaluate(CONTRAST)}
    for name in TABS:
        opened(page, name)
        found[name] = page.evaluate(CONTRAST)
    assert {name: one["poor"] for name, one in found.items() if one["poor"]} == {}
    assert all(one["seen"] >= 15 for one in found.values()), found


# Pairs of what must not lie over each other: cells of a row, the name and the value of a bar, rows of chips.
OVERLAPS = """
() => {
  const over = [];
  const boxes = (element) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    return [...range.getClientRects()].filter((box) => box.width > 1 && box.height > 1);
  };
  const beside = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 1;
  const apart = (a, b) => beside(a, b) || beside(b, a);
  const check = (parts) => {
    for (const [at, one] of parts.entries())
      for (const two of parts.slice(at + 1))
        if (boxes(one).some((a) => boxes(two).some((b) => !apart(a, b))))
          over.push(`${one.textContent.slice(0, 40)} | ${two.textContent.slice(0, 40)}`);
  };
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((one) => one.checkVisibility());
  for (const row of shown('table tr')) check([...row.cells]);
  for (const bar of shown('ul.bars a, ul.bars .row')) check([...bar.querySelectorAll('span:not(.row), b')]);
  for (const group of shown('p.why, #facts p')) check([...group.children]);
  for (const box of shown('#explanation .streams > *, #samples section, .matches article, .panels figure')) {
    const frame = box.getBoundingClientRect();
    for (const words of box.querySelectorAll('a, p, figcaption'))
      if (boxes(words).some((a) => a.right > frame.right + 1)) over.push(`out of its box: ${words.textContent}`);
  }
  return over;
}
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_names_stay_in_their_place(visit, width):
    page = visit(viewport={"width": width, "height": 900})
    for name in TABS[:4]:
        opened(page, name)
        assert page.evaluate(OVERLAPS) == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_answers_are_scrolled_to_on_a_phone(visit, names):
    page = visit(**PHONE)
    for name, place, first in (("Explain", "explanation", "figure"), ("Retrieve", "matches", ".query")):
        opened(page, name)
        page.wait_for_timeout(800)
        top = page.locator(f"#{place} {first}").first.evaluate("one => one.getBoundingClientRect().top")
        assert 0 <= top < 500, (name, top)
    page.get_by_role("tab", name="Concept explorer").click()
    page.locator("#latents tbody a").nth(3).click()
    page.wait_for_timeout(1500)
    assert 0 <= page.locator("#facts h2").evaluate("one => one.getBoundingClientRect().top") < 500


def test_answers_beside_the_question_are_not_scrolled_to(visit):
    page = visit(viewport={"width": 1280, "height": 1400})
    page.get_by_role("tab", name="Retrieve").click()
    page.fill("#retrieve-caption textarea", "a red circle")
    page.click("#retrieve-button")
    page.wait_for_selector("#matches article")
    page.wait_for_timeout(800)
    assert page.evaluate("scrollY") == 0


def test_arrow_keys_move_between_tabs(visit):
    page = visit()

    def chosen() -> str:
        focused = page.evaluate("document.activeElement.innerText.trim()")
        assert page.locator("[role=tab][aria-selected=true]").inner_text().strip() == focused
        return focused

    page.get_by_role("tab", name=TABS[0]).focus()
    for key, name in (
        ("ArrowRight", TABS[1]),
        ("ArrowRight", TABS[2]),
        ("ArrowLeft", TABS[1]),
        ("End", TABS[-1]),
        ("ArrowRight", TABS[0]),
        ("ArrowLeft", TABS[-1]),
        ("Home", TABS[0]),
    ):
        page.keyboard.press(key)
        page.wait_for_timeout(200)
        assert chosen() == name, key
    # Elsewhere the keys do what they always do.
    page.locator("#number textarea, #number input").first.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert page.locator("[role=tab][aria-selected=true]").inner_text().strip() == TABS[0]
