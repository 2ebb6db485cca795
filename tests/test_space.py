"""The Space as it is used: its API through gradio_client, its page in headless Chromium, and its files as pushed."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from space_demo import space_app

from sparc_hf.cli import main

gradio_client = pytest.importorskip("gradio_client", reason="the Space needs gradio")

TABS = ("Concept explorer", "Explain", "Retrieve", "Compare models", "About")
SIMILARITY = "similarity of image and caption"


@pytest.fixture(scope="module")
def data(small_space):
    return small_space


@pytest.fixture(scope="module")
def url(data):
    blocks = space_app().launch(data, prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False)


@pytest.fixture(scope="module")
def picture(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    data.image(3).save(path)
    return path


def asked(client, *values, api_name):
    values = [gradio_client.handle_file(str(one)) if isinstance(one, Path) else one for one in values]
    return client.predict(*values, api_name=api_name)


def refusal(client, *values, api_name) -> str:
    """Return the message of a refused request, and make sure that it is no accident."""
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        asked(client, *values, api_name=api_name)
    message = str(caught.value)
    assert "Traceback" not in message
    assert "Something went wrong" not in message
    return message


def test_latents_through_the_api(client, data):
    best = data.find_latents()[0]
    table = asked(client, "", "alignment, single-stream", api_name="/find_latents")
    assert f'data-latent="{best}"' in table
    facts, samples = asked(client, str(best), api_name="/latent")
    assert f"{data.index.statistics['alignment/single'][best]:.3f}" in facts
    assert 'class="heat"' not in samples
    assert asked(client, str(best), True, api_name="/latent_maps").count('class="heat"') > 0


@pytest.mark.parametrize("number", ["96", "-1", "abc", "", "9" * 400, "<script>alert(1)</script>", 1.5])
def test_unknown_latents(client, number):
    message = refusal(client, number, api_name="/latent")
    assert "numbered from 0 to 95" in message
    assert "<script>" not in message


def test_explain_through_the_api(client, picture):
    found = asked(client, picture, "a red circle", SIMILARITY, api_name="/explain")
    assert found.count('class="heat"') == 3  # two image streams and the baseline
    assert "<mark" in found
    assert "Where 5" in asked(client, picture, "", "5", api_name="/explain")
    assert 'class="heat"' not in asked(client, None, "a red circle", "5", api_name="/explain")
    assert "No latent has" in refusal(client, picture, "", "no such thing", api_name="/explain")
    assert "give one of these" in refusal(client, None, "", SIMILARITY, api_name="/explain")


def test_a_word_means_the_latent_of_that_name_first_and_says_why(client, data, picture):
    names = sorted({data.name(latent) for latent in data.find_latents()} - {None})
    assert len(names) > 3
    for name in names:
        table = html.unescape(asked(client, name, "energy", api_name="/find_latents"))
        first = int(re.search(r'data-latent="(\d+)"', table).group(1))
        assert data.name(first) == name
        assert f'<small class=why>name "{name}"</small>' in table
        found = html.unescape(asked(client, picture, "", name, api_name="/explain"))
        meant = data.match_latents(name)[0].latent
        assert data.name(meant) == name
        assert f"Where {data.title(meant)} is" in found
        assert f'{data.title(meant)} is shown because of its name "{name}".' in found
    label = next(
        one.name for concept in data.index.concepts.values() for one in concept.labels if one.name not in names
    )
    meant = data.match_latents(label)[0]
    assert meant.reason.startswith("label")
    found = html.unescape(asked(client, picture, "", label, api_name="/explain"))
    assert f"{data.title(meant.latent)} is shown because of its {meant.reason}." in found
    assert "because of" not in asked(client, picture, "", data.title(meant.latent), api_name="/explain")


def test_retrieve_through_the_api(client, data, picture):
    for values in ((None, "a red circle", "", "clip_txt", "clip_img"), (picture, "", "", "clip_img", "clip_txt")):
        found = asked(client, *values, api_name="/retrieve")
        assert found.count("<article>") == 12
        assert found.count('class="why"') + found.count("class=why") == 13
    across = asked(client, None, "", "7", "dino", "clip_img", api_name="/retrieve")
    match = data.retrieve("dino", "clip_img", 7)[0]
    assert f"<b>{match.similarity:.3f}</b>" in across
    assert "Type a caption" in refusal(client, None, "", "", "clip_txt", "clip_img", api_name="/retrieve")
    assert "Choose an image" in refusal(client, None, "", "", "dino", "clip_img", api_name="/retrieve")
    assert "numbered from 0 to 149" in refusal(client, None, "", "150", "dino", "dino", api_name="/retrieve")
    assert "not in the list" in refusal(client, None, "red", "", "sound", "clip_img", api_name="/retrieve")


def test_strange_images_through_the_api(client, tmp_path):
    Image.new("CMYK", (40, 30)).save(tmp_path / "print.jpg")
    assert "CMYK" in asked(client, tmp_path / "print.jpg", "", "5", api_name="/explain")
    Image.new("RGB", (40, 30)).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")]
    )
    assert "first frame" in asked(client, tmp_path / "a.gif", "", "5", api_name="/explain")
    Image.new("1", (6000, 6000)).save(tmp_path / "wide.png")
    assert "6,000 x 6,000" in refusal(client, tmp_path / "wide.png", "", "5", api_name="/explain")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert "too many pixels" in refusal(client, tmp_path / "bomb.png", "", "5", api_name="/explain")
    (tmp_path / "page.html").write_text("<script>alert(1)</script>")
    assert "cannot be read as an image" in refusal(client, tmp_path / "page.html", "", "5", api_name="/explain")
    (tmp_path / "big.png").write_bytes(bytes(12 * 2**20))
    with pytest.raises(ValueError, match="maximum file size"):
        asked(client, tmp_path / "big.png", "", "5", api_name="/explain")


def test_long_texts_and_markup_through_the_api(client):
    for values, name in (
        (("x" * 100_000, "energy"), "/find_latents"),
        ((None, "x" * 100_000, SIMILARITY), "/explain"),
        ((None, "red", "x" * 100_000), "/explain"),
        ((None, "x" * 100_000, "", "clip_txt", "dino"), "/retrieve"),
    ):
        assert "100,000 characters" in refusal(client, *values, api_name=name)
    evil = "red <img src=x onerror=alert(1)>"
    assert "<img src=x" not in asked(client, None, evil, "5", api_name="/explain")
    assert "<img src=x" not in asked(client, None, evil, "", "clip_txt", "clip_img", api_name="/retrieve")


def test_no_request_names_a_model(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/find_latents", "/latent", "/latent_maps", "/explain", "/retrieve", "/compare"}
    inputs = {one["parameter_name"] for endpoint in named.values() for one in endpoint["parameters"]}
    assert inputs == {
        "search",
        "order",
        "number",
        "wanted",
        "picture",
        "caption",
        "target",
        "sample",
        "source",
        "encoding",
    }


def test_the_spaces_header_names_the_tested_gradio():
    header = (ROOT / "spaces_app" / "README.md").read_text().split("---\n")[1]
    pinned = re.search(r"^gradio==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    assert f"sdk: gradio\nsdk_version: {pinned}\n" in header
    assert "app_file: app.py\n" in header


def test_the_command_explains_itself(capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main(["space", "--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--model", "--features", "--host", "--port", "SPARC_MODEL"))
    assert main(["space", "--model", str(tmp_path / "none"), "--cache", str(tmp_path)]) == 2
    assert "no feature dataset" in capsys.readouterr().err


# The page in a browser.


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_exploring_by_mouse(visit, data):
    page = visit()
    page.wait_for_selector("#samples img.heat")
    second = data.find_latents("", "alignment, single-stream")[1]
    page.click(f'#latents a[data-latent="{second}"]')
    page.wait_for_function(f"document.querySelector('#facts h2').innerText === {data.title(second)!r}")
    page.wait_for_function(f"location.search.includes('latent={second}')")
    assert page.locator("#number textarea, #number input").input_value() == str(second)
    near = data.latent(second).neighbours["dino"][0][0]
    page.locator(f'#facts a[data-latent="{near}"]').first.click()
    page.wait_for_function(f"document.querySelector('#facts h2').innerText === {data.title(near)!r}")
    page.get_by_role("button", name="next").click()
    page.wait_for_function("document.querySelector('#latents nav').innerText.includes('page 2')")
    page.fill("#search textarea, #search input", "nosuchword")
    page.wait_for_selector("#latents .empty")


def test_exploring_by_keyboard(visit, data):
    page = visit()
    page.focus("#search textarea, #search input")
    third = page.locator("#latents tbody a").nth(2)
    for _ in range(40):
        page.keyboard.press("Tab")
        if third.evaluate("link => link === document.activeElement"):
            break
    else:
        pytest.fail("the list of latents cannot be reached with the Tab key")
    title = third.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_function("title => document.querySelector('#facts h2').innerText === title", arg=title)


@pytest.mark.parametrize("number", ["17", "96", "abc", "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E"])
def test_links_to_a_latent(visit, data, number):
    page = visit(f"?latent={number}")
    if number == "17":
        page.wait_for_function(f"document.querySelector('#facts h2').innerText === {data.title(17)!r}")
    else:
        page.get_by_text("numbered from 0 to 95").wait_for()
        assert page.locator("#facts h2").inner_text() == data.title(data.find_latents()[0])


def test_explaining_in_the_page(visit, picture):
    page = visit()
    tab(page, "Explain")
    page.locator("#explain-strip button").nth(2).click()
    page.wait_for_selector("#explanation img.heat")
    assert page.locator("#explanation figure").count() == 3
    assert page.locator("#explanation mark").count() > 3
    shown = "getComputedStyle(document.querySelector('#explanation img.heat')).opacity"
    assert page.evaluate(shown) == "0.65"
    page.locator("#opacity input[type=number]").fill("0.2")
    page.locator("#opacity input[type=number]").press("Enter")
    page.wait_for_function(f"{shown} === '0.2'")
    bar = page.locator("#explanation ul.bars a").nth(1)
    title = bar.locator("span").inner_text()
    bar.click()
    page.wait_for_selector("#explanation li.chosen")
    assert f"Where {title} is" in page.locator("#explanation h3").first.inner_text()
    page.locator("#explanation a[data-open]").click()
    page.wait_for_function("title => document.querySelector('#facts h2').innerText === title", arg=title)
    assert page.locator("#facts").is_visible()
    tab(page, "Explain")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.set_input_files("#explain-image input[type=file]", str(picture))
    page.fill("#explain-caption textarea", "a <b>green</b> star")
    page.wait_for_selector("#explain-image img")
    page.click("#explain-button")
    page.wait_for_function("document.querySelector('#explanation .caption')?.innerText === 'a <b>green</b> star'")


def test_a_refusal_is_shown_and_the_page_goes_on(visit, tmp_path):
    Image.fromarray(np.zeros((5, 300), np.uint8)).save(tmp_path / "thin.png")
    page = visit()
    tab(page, "Explain")
    page.set_input_files("#explain-image input[type=file]", str(tmp_path / "thin.png"))
    page.wait_for_selector("#explain-image img")
    page.click("#explain-button")
    page.get_by_text("300 x 5 pixels").wait_for()
    page.locator("#explain-strip button").first.click()
    page.wait_for_selector("#explanation img.heat")


def test_retrieving_in_the_page(visit):
    page = visit()
    tab(page, "Retrieve")
    page.fill("#retrieve-caption textarea", "a red circle <script>alert(1)</script>")
    page.click("#retrieve-button")
    page.wait_for_selector("#matches article")
    assert page.locator("#matches article").count() == 12
    assert "<script>" in page.locator("#matches .query").inner_text()
    page.get_by_label("image to image").check()
    page.locator("#retrieve-strip button").nth(4).click()
    page.wait_for_selector("#matches .query img")
    page.locator("#matches .why a").first.click()
    page.wait_for_selector("#facts h2", state="visible")


def test_comparing_in_the_page(visit, data):
    page = visit()
    tab(page, "Compare models")
    page.wait_for_selector("#comparison svg a[data-latent]")
    for encoding in ("joint", "single"):
        page.get_by_label(encoding, exact=True).check()
        error = data.index.results[encoding]["reconstruction"]["nmse"]["dino"]["clip_txt"]
        page.locator("#comparison").get_by_text(f"{error:.3f}").wait_for()
    points = page.locator("#comparison svg a[data-latent]")
    assert points.count() == (data.index.statistics["energy/single"] > 0).sum()
    latent = int(points.last.get_attribute("data-latent"))
    points.last.locator("use").click(force=True)
    page.wait_for_function("document.querySelector('#facts')?.checkVisibility()")
    opened = page.locator("#facts h2").inner_text()
    # Points may lie on each other; the one on top is opened.
    x, y = (data.index.statistics[name] for name in ("energy/single", "cofires/single"))
    found = int(opened.split(" ")[0])
    assert y[found] == pytest.approx(y[latent], abs=3)
    assert x[found] == pytest.approx(x[latent], rel=0.5)


def test_the_card(visit):
    page = visit()
    tab(page, "About")
    page.get_by_role("heading", name="SPARC on the embedded world").wait_for()
    page.wait_for_function("document.querySelector('#card img')?.naturalWidth > 100")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_tab_fits_a_phone_in_both_themes(visit, theme, tmp_path):
    page = visit(f"?__theme={theme}", viewport={"width": 390, "height": 844}, color_scheme=theme)
    page.wait_for_selector("#samples img.heat")
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    ink, paper = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{what}"))[:3]))
        for what in ("color", "backgroundColor")
    )
    assert (ink > paper) == (theme == "dark")
