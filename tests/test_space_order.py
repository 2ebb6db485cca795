"""What the page shows when answers come late, and when a visitor changes the question in between."""

import time
from pathlib import Path

import pytest
from space_demo import space_app

pytest.importorskip("gradio", reason="the Space needs gradio")

SLOW = 3.0


@pytest.fixture(scope="module")
def data(small_space):
    return small_space


@pytest.fixture(scope="module")
def late(data) -> dict:
    """What takes long: "latents" whose maps do, and "captions" that are explained slowly; "seen": what was done."""
    return {"latents": data.find_latents()[10:12], "captions": ["a slow caption"], "seen": []}


@pytest.fixture(scope="module")
def url(data, late):
    app = space_app()
    quick_maps, quick_explain = app.latent_maps, app.explain

    def latent_maps(data, latent, rows):
        if latent in late["latents"]:
            time.sleep(SLOW)
        late["seen"].append(latent)
        return quick_maps(data, latent, rows)

    def explain(data, image, caption="", **options):
        if caption in late["captions"]:
            time.sleep(SLOW)
        late["seen"].append(caption)
        return quick_explain(data, image, caption, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "latent_maps", latent_maps)
        patch.setattr(app, "explain", explain)
        blocks = app.launch(data, prevent_thread_lock=True, quiet=True)
        yield blocks.local_url
        blocks.close()


@pytest.fixture(scope="module")
def pictures(data, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{row}.png" for row in (3, 8)]
    for row, path in zip((3, 8), paths, strict=True):
        data.image(row).save(path)
    return paths


def wait_until(holds, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def shows_latent(page, data, latent: int, maps: bool = True) -> None:
    """Wait until heading and samples are a latent's."""
    page.wait_for_function(f"document.querySelector('#facts h2')?.innerText === {data.title(latent)!r}")
    page.wait_for_function(f"!!document.querySelector('#samples img.heat') === {str(maps).lower()}")
    values = page.locator("#samples figcaption").all_inner_texts()
    assert values == [f"{value:.2f}" for best in data.latent(latent).samples.values() for _, value in best]


def box(page, name: str):
    return page.locator(f"#{name} textarea, #{name} input").first


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def explain_with(page, picture: Path | None = None, caption: str | None = None) -> None:
    if picture is not None:
        page.set_input_files("#explain-image input[type=file]", str(picture))
        page.wait_for_selector("#explain-image img")
    if caption is not None:
        box(page, "explain-caption").fill(caption)
    page.click("#explain-button")


def explained_caption(page, caption: str) -> None:
    page.wait_for_function(f"document.querySelector('#explanation .caption')?.innerText === {caption!r}")


def remove_picture(page, place: str) -> None:
    page.locator(f"#{place}").get_by_label("Remove Image").or_(page.locator(f"#{place}").get_by_label("Clear")).click()
    page.wait_for_selector(f"#{place} input[type=file]", state="attached")


def test_maps_are_of_the_latent_whose_heading_is_shown(visit, data):
    first, other = data.find_latents()[1:3]
    page = visit(f"?latent={first}")
    shows_latent(page, data, first)
    box(page, "number").fill(str(other))
    page.locator("#with-maps input").uncheck()
    shows_latent(page, data, first, maps=False)
    page.locator("#with-maps input").check()
    shows_latent(page, data, first)
    box(page, "number").press("Enter")
    shows_latent(page, data, other)


def test_late_maps_do_not_come_under_another_heading(visit, data, late):
    slow, quick = late["latents"][0], data.find_latents()[5]
    page = visit(f"?latent={data.find_latents()[2]}")
    shows_latent(page, data, data.find_latents()[2])
    late["seen"].clear()
    page.click(f'#latents a[data-latent="{slow}"]')
    page.wait_for_function(f"document.querySelector('#facts h2').innerText === {data.title(slow)!r}")
    page.click(f'#latents a[data-latent="{quick}"]')
    page.wait_for_function(f"document.querySelector('#facts h2').innerText === {data.title(quick)!r}")
    wait_until(lambda: slow in late["seen"] and quick in late["seen"])
    page.wait_for_timeout(1000)
    shows_latent(page, data, quick)
    assert box(page, "number").input_value() == str(quick)
    assert f"latent={quick}" in page.url


def test_maps_that_come_after_they_were_switched_off_are_not_shown(visit, data, late):
    slow = late["latents"][1]
    page = visit()
    shows_latent(page, data, data.find_latents()[0])
    late["seen"].clear()
    page.click(f'#latents a[data-latent="{slow}"]')
    page.wait_for_function(f"document.querySelector('#facts h2').innerText === {data.title(slow)!r}")
    page.locator("#with-maps input").uncheck()
    wait_until(lambda: slow in late["seen"])
    page.wait_for_timeout(1500)
    shows_latent(page, data, slow, maps=False)


def test_a_new_picture_has_neither_the_old_caption_nor_the_old_maps(visit, pictures):
    page = visit()
    tab(page, "Explain")
    page.locator("#explain-strip button").nth(2).click()
    page.wait_for_selector("#explanation img.heat")
    assert box(page, "explain-caption").input_value()
    remove_picture(page, "explain-image")
    page.wait_for_selector("#explanation .empty")
    assert box(page, "explain-caption").input_value() == ""
    explain_with(page, pictures[0], "a red circle")
    page.wait_for_selector("#explanation img.heat")
    remove_picture(page, "explain-image")
    page.set_input_files("#explain-image input[type=file]", str(pictures[1]))
    page.wait_for_selector("#explain-image img")
    page.wait_for_selector("#explanation .empty")
    assert box(page, "explain-caption").input_value() == ""


def test_a_caption_typed_for_the_new_picture_stays(visit, pictures):
    page = visit()
    tab(page, "Explain")
    box(page, "explain-caption").fill("a blue star")
    page.set_input_files("#explain-image input[type=file]", str(pictures[0]))
    page.wait_for_selector("#explain-image img")
    page.wait_for_timeout(500)
    assert box(page, "explain-caption").input_value() == "a blue star"
    explain_with(page)
    explained_caption(page, "a blue star")


def test_an_explanation_that_comes_after_a_new_picture_is_not_shown(visit, pictures, late):
    page = visit()
    tab(page, "Explain")
    late["seen"].clear()
    explain_with(page, pictures[0], "a slow caption")
    page.wait_for_timeout(500)
    remove_picture(page, "explain-image")
    page.set_input_files("#explain-image input[type=file]", str(pictures[1]))
    page.wait_for_selector("#explain-image img")
    wait_until(lambda: "a slow caption" in late["seen"])
    page.wait_for_timeout(1500)
    assert page.locator("#explanation .empty").count() == 1
    assert page.locator("#explanation img.heat").count() == 0


def test_of_two_explanations_the_one_asked_for_last_is_shown(visit, pictures, late):
    page = visit()
    tab(page, "Explain")
    explain_with(page, pictures[0], "a slow caption")
    page.wait_for_timeout(300)
    late["seen"].clear()
    explain_with(page, None, "a quick caption")
    explained_caption(page, "a quick caption")
    wait_until(lambda: "a quick caption" in late["seen"])
    page.wait_for_timeout(int(1000 * SLOW))
    explained_caption(page, "a quick caption")


def test_a_pick_after_a_slow_explanation_wins(visit, pictures, late):
    page = visit()
    tab(page, "Explain")
    late["seen"].clear()
    explain_with(page, pictures[0], "a slow caption")
    page.wait_for_timeout(300)
    page.locator("#explain-strip button").nth(1).click()
    picked = page.locator("#explain-strip button").nth(1).get_attribute("title").split(": ", 1)[1]
    explained_caption(page, picked)
    wait_until(lambda: "a slow caption" in late["seen"])
    page.wait_for_timeout(1500)
    explained_caption(page, picked)


def test_a_typed_caption_takes_the_place_of_a_sample(visit, data):
    page = visit()
    tab(page, "Retrieve")
    box(page, "retrieve-sample").fill("5")
    page.click("#retrieve-button")
    page.wait_for_selector("#matches article")
    assert page.locator("#matches .query .caption").inner_text() == data.caption(5)
    box(page, "retrieve-caption").fill("a green triangle")
    wait_until(lambda: box(page, "retrieve-sample").input_value() == "")
    page.click("#retrieve-button")
    page.wait_for_function("document.querySelector('#matches .query .caption').innerText === 'a green triangle'")
    box(page, "retrieve-sample").fill("7")
    wait_until(lambda: box(page, "retrieve-caption").input_value() == "")
    page.click("#retrieve-button")
    page.wait_for_function(f"document.querySelector('#matches .query .caption').innerText === {data.caption(7)!r}")


def test_a_new_picture_takes_the_place_of_a_sample(visit, data, pictures):
    page = visit()
    tab(page, "Retrieve")
    page.get_by_label("image to image").check()
    box(page, "retrieve-sample").fill("5")
    page.click("#retrieve-button")
    page.wait_for_selector("#matches article")
    page.set_input_files("#retrieve-image input[type=file]", str(pictures[0]))
    page.wait_for_selector("#retrieve-image img")
    wait_until(lambda: box(page, "retrieve-sample").input_value() == "")
    page.click("#retrieve-button")
    page.wait_for_function("!document.querySelector('#matches .query .caption')")  # a picture of nobody's sample
    box(page, "retrieve-sample").fill("7")
    page.wait_for_selector("#retrieve-image input[type=file]", state="attached")
    page.click("#retrieve-button")
    page.wait_for_function(f"document.querySelector('#matches .query .caption')?.innerText === {data.caption(7)!r}")


def test_programs_cannot_ask_for_two_things_at_once(url, data, pictures):
    client_library = pytest.importorskip("gradio_client")
    client = client_library.Client(url, verbose=False)
    picture = client_library.handle_file(str(pictures[0]))
    for values, words in (
        ((None, "a red circle", "5", "clip_txt", "clip_img"), "another caption"),
        ((picture, "", "5", "dino", "clip_img"), "Both an image and the number of sample 5"),
    ):
        with pytest.raises(client_library.exceptions.AppError, match=words):
            client.predict(*values, api_name="/retrieve")
    told = client.predict(None, data.caption(5), "5", "clip_txt", "clip_img", api_name="/retrieve")
    assert told.count("<article>") == 12


def test_a_caption_too_long_to_be_read_is_said_to_be(visit, data):
    page = visit()
    tab(page, "Explain")
    explain_with(page, None, "a red circle " * 40 + "and a star that nobody reads")
    page.wait_for_selector("#explanation .remark")
    remarks = page.locator("#explanation .remark").all_inner_texts()
    assert any("clip_txt reads only" in remark and remark.endswith("star that nobody reads") for remark in remarks)
