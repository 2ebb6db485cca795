"""Panels, contact sheets, heatmaps and maximisation, on the shipped encoders."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from tiny_encoders import save_vit

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.cli import main
from sparc_hf.codes.concepts import Concept, Evidence, load_concepts, save_concepts, vocabulary_evidence
from sparc_hf.codes.encoding import sample_codes
from sparc_hf.demo.scenes import CLASS_NAMES, make_scene, make_scenes_dataset
from sparc_hf.encoders.stream_encoder import StreamEncoder, load_encoders
from sparc_hf.encoders.trace import trace
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.stream_records import parse_streams
from sparc_hf.maps import plots as map_plots
from sparc_hf.maps.explanation import active_latents, explain_sample
from sparc_hf.maps.maximisation import MaximisationSettings, maximise_latent
from sparc_hf.maps.patch_maps import image_maps
from sparc_hf.maps.targets import SimilarityTarget

STREAMS = ("dino=demo:dino:image", "clip_img=demo:clip:image", "clip_txt=demo:clip:text")
SCENE = make_scene(5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Encoders, a model that nobody trained, saved, and features of a few scenes."""
    folder = tmp_path_factory.mktemp("explain")
    encoders = load_encoders(parse_streams(STREAMS))
    torch.manual_seed(0)
    streams = [one.record for one in encoders.values()]
    model = SparcModel(SparcConfig(streams=streams, num_latents=32, k=6, auxk=8)).eval()
    model.save_pretrained(folder / "model")
    save_concepts(
        [Concept(3, "circle", 5.0, {}), Concept(9, "circle", 8.0, {}, [Evidence("dot", 2.0, 3, 4.0)])],
        folder / "model",
    )
    columns = {"image_column": "image", "text_column": "text", "labels_column": "labels", "label_names": CLASS_NAMES}
    extract_features(
        make_scenes_dataset("test", 24, 0), encoders, folder / "features", keep_columns=("image",), **columns
    )
    return model, encoders, folder


def run(command: str, capsys) -> dict:
    assert main(command.split()) in (0, None)
    return json.loads(capsys.readouterr().out)


def test_an_explanation_holds_concepts_and_the_agreement(world):
    model, encoders, _ = world
    found = explain_sample(model, encoders, SCENE.image, SCENE.captions[0], {"one": [3], "two": [3, 9]})
    assert [target.title for target in found.targets] == ["one", "two", "agreement of image and clip_txt"]
    codes = sample_codes(model, encoders, SCENE.image, SCENE.captions[0])
    for target, latents in zip(found.targets, ([3], [3, 9]), strict=False):
        assert list(target.maps) == ["dino", "clip_img"]
        for name, heat in target.maps.items():
            active = float(codes[name][latents].sum()) > 0
            assert (heat is not None and heat.shape == (64, 64)) if active else heat is None
            assert (name in target.inactive) == (not active)
        assert list(target.words) == ["clip_txt"]
    agreement = found.targets[2]
    assert list(agreement.maps) == ["dino", "clip_img", "clip_img, embeddings (baseline)"]
    assert list(agreement.words) == ["clip_txt for dino", "clip_txt for clip_img"]
    assert [word.word for word in agreement.words["clip_txt for dino"]] == SCENE.captions[0].split()
    figure = found.panel()
    drawn = [axis for axis in figure.axes if axis.images]
    assert len(drawn) == 3 + 3 + 4 + 1  # and the scale


def test_images_or_captions_alone_are_explained(world):
    model, encoders, _ = world
    only_image = explain_sample(model, encoders, SCENE.image, "", {"one": [3]})
    assert [list(target.words) for target in only_image.targets] == [[]]
    only_text = explain_sample(model, encoders, None, "a red circle", {"one": [3]})
    assert [dict(target.maps) for target in only_text.targets] == [{}]
    only_text.panel()
    only_image.panel()
    with pytest.raises(ValueError, match="an image, a caption, or both"):
        explain_sample(model, encoders, None, "", {"one": [3]})


def test_a_huge_image_is_explained_on_a_small_copy(world):
    model, encoders, _ = world
    found = explain_sample(model, encoders, Image.new("RGB", (6000, 30), "red"), "red", {"one": [3]})
    assert found.image.size == (640, 3)
    assert found.targets[-1].maps["dino"].shape == (3, 640)


def test_a_stream_without_maps_is_a_remark(world, monkeypatch, tmp_path, capsys):
    """A backbone that shows no attention maps costs its own maps and words, and not the panel."""
    model, encoders, folder = world
    caption = SCENE.captions[0]
    traced = trace

    def refuse(encoder, *args):
        if encoder.name == "clip_img":
            return traced(encoder, *args)
        raise ValueError("no attention maps here")

    monkeypatch.setattr("sparc_hf.maps.methods.trace", refuse)
    codes = sample_codes(model, encoders, SCENE.image, caption)
    shared = active_latents({name: codes[name] for name in ("clip_img",)}, 1)
    found = explain_sample(model, encoders, SCENE.image, caption, {"one": shared})
    assert found.remarks[-1] == "clip_txt has no scores of words: no attention maps here"
    assert "dino has no map: no attention maps here" in found.remarks
    assert [list(target.grids) for target in found.targets] == [["clip_img"], ["clip_img"]]
    assert list(found.baselines) == ["clip_img"]
    assert {"dino has no map: no attention maps here", *found.remarks} <= {
        line for words, _ in shown_texts(found.panel()) for line in words.split("\n")
    }
    SCENE.image.save(tmp_path / "a.png")
    base = f"explain --model {folder}/model --shifts 1 --output {tmp_path}/panels --image {tmp_path}/a.png"
    assert (
        "dino has no map: no attention maps here"
        in run(f"{base} --latents 3 --text a", capsys)["samples"][0]["remarks"]
    )


def test_settings_that_do_not_exist_are_errors_and_no_remarks(world):
    model, encoders, _ = world
    for latents, options, message in (
        ({"one": [3]}, {"method": "saliency"}, "`method` must be one of"),
        ({"one": [3]}, {"shifts": 0}, "`shifts` must be at least 1"),
        ({"one": [32]}, {}, "a concept needs latents from 0 to 31"),
        ({"one": []}, {}, "a concept needs latents from 0 to 31"),
    ):
        with pytest.raises(ValueError, match=message):
            explain_sample(model, encoders, SCENE.image, "", latents, **options)


def test_maps_of_coarse_grids_are_finer_and_cover_what_the_encoder_sees(world):
    model, encoders, _ = world
    caption = SCENE.captions[0]
    found = explain_sample(model, encoders, SCENE.image, caption, {})
    plain = explain_sample(model, encoders, SCENE.image, caption, {}, shifts=1)
    for name, encoder in encoders.items():
        if encoder.modality == "image":
            rows, columns = encoder.record["grid"]
            assert found.targets[0].grids[name].shape == (4 * rows, 4 * columns)
            assert plain.targets[0].grids[name].shape == (rows, columns)
            assert found.views[name].size == (64, 64)
    assert found.baselines["clip_img"].shape == found.targets[0].grids["clip_img"].shape
    assert explain_sample(model, encoders, SCENE.image, caption, {}, agreement=False).targets == []


def test_words_that_are_not_read_are_a_remark(world):
    model, encoders, _ = world
    found = explain_sample(model, encoders, None, "a small blue square beside " * 40 + "the very last words", {})
    assert len(found.remarks) == 1
    assert found.remarks[0].startswith("clip_txt reads only the beginning")
    assert found.remarks[0].endswith("the very last words")


def test_codes_and_active_latents_of_a_sample(world):
    model, encoders, _ = world
    rows = {name: one.rows(one.prepare([SCENE.image])) for name, one in encoders.items() if one.modality == "image"}
    dense = {name: code.to_dense()[0] for name, code in model.encode(rows, "local").items()}
    codes = sample_codes(model, encoders, SCENE.image, "")
    assert codes.keys() == dense.keys()
    assert all(torch.equal(codes[name], values) for name, values in dense.items())
    expected = sum(values / values.norm() for values in dense.values()).topk(4).indices.tolist()
    assert active_latents(codes, 4) == expected
    silent = next(latent for latent in range(32) if not codes["dino"][latent])
    found = explain_sample(model, encoders, SCENE.image, "", {"silent": [silent], "first": expected[:1]}).targets
    assert found[0].notes["dino"] == "not active"
    assert found[1].notes == {
        name: f"{code[expected[0]]:.2f}" if code[expected[0]] > 0 else "not active" for name, code in codes.items()
    }


def test_the_command_draws_and_goes_on_where_it_stopped(world, tmp_path, capsys):
    _, _, folder = world
    SCENE.image.save(tmp_path / "a.png")
    base = f"explain --model {folder}/model --shifts 1 --output {tmp_path}/panels"
    told = run(f"{base} --image {tmp_path}/a.png --text circle --concept circle", capsys)
    assert told["samples"][0]["targets"][0]["title"] == "circle (latents 9, 3)"
    assert told["concepts"]["circle"][0] == {"latent": 9, "matched_by": 'name "circle"'}
    assert Image.open(tmp_path / "panels" / "a.png").width > 500
    again = run(f"{base} --image {tmp_path}/a.png --text circle --concept circle", capsys)
    assert (again["drawn"], again["kept"]) == (0, 1)
    by_label = run(f"{base} --text dot --concept dot", capsys)
    assert by_label["samples"][0]["targets"][0]["title"] == 'dot (latent 9 by its label "dot")'
    told = run(f"{base} --features {folder}/features --rows 2 --latents 4", capsys)
    assert (told["drawn"], told["kept"]) == (2, 0)
    assert len(list((tmp_path / "panels").iterdir())) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--image missing.png", "cannot be read as an image"),
        ("--text a --latents 99", "latents from 0 to 31"),
        ("--text a --concept zebra", "no concept named `zebra`"),
        ("", "give images, captions, or a feature dataset"),
        ("--text a --top 0", "`top` must be at least 1"),
        ("--text a --rows -3", "`rows` must be at least 1"),
    ],
)
def test_what_cannot_be_explained_is_told(world, tmp_path, capsys, flags, message):
    assert main(f"explain --model {world[2]}/model --output {tmp_path}/p {flags}".split()) == 2
    assert message in capsys.readouterr().err


def test_concepts_draws_sheets_heatmaps_and_images(world, tmp_path, capsys):
    folder = world[2]
    SparcModel.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "words.txt").write_text("circle\nstar\nred\n\ngreen\n")
    told = run(
        f"concepts --model {tmp_path}/model --features {folder}/features --output {tmp_path}/out --latents 3 --top 1 "
        f"--heatmaps 2 --heatmap_images 3 --maximise 5 --steps 2 --shifts 1 --vocabulary {tmp_path}/words.txt",
        capsys,
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"latent-00003.png", "heatmaps.png", "maximised-00005.png"} <= files
    assert not [name for name in files if name.endswith(".tmp")]
    assert set(told["maximised"][0]["streams"]) == {"dino", "clip_img"}
    named = {concept.latent: concept for concept in load_concepts(tmp_path / "model")}
    assert all({word.name for word in one.vocabulary} <= {"circle", "star", "red", "green"} for one in named.values())
    assert any(one.vocabulary for one in named.values())
    assert main(f"concepts --model {tmp_path}/model --maximise 99 --output {tmp_path}/out".split()) == 2
    assert "there are no latents [99]" in capsys.readouterr().err
    assert main(f"concepts --model {tmp_path}/model".split()) == 2
    assert main(f"concepts --model {tmp_path}/model --maximise 1".split()) == 2


def test_latents_named_by_a_vocabulary_alone_have_sheets_too(world, tmp_path, capsys):
    model, encoders, folder = world
    model.save_pretrained(tmp_path / "model")
    features = FeatureDataset.load(folder / "features")
    bare = FeatureDataset.from_arrays({name: features.array(name) for name in encoders}, streams=features.streams)
    bare.save(tmp_path / "bare")
    (tmp_path / "words.txt").write_text(
        "\n".join(
            ["circle", "star", "red", "green", "a small cat", "noise"] * 2 + [f"word {number}" for number in range(40)]
        )
    )
    base = f"concepts --model {tmp_path}/model --features {tmp_path}/bare --vocabulary {tmp_path}/words.txt"
    told = run(f"{base} --output {tmp_path}/out --top 2", capsys)
    assert told["named"] > 0
    sheets = [int(path[-9:-4]) for path in told["sheets"]]
    named = {one.latent: one for one in load_concepts(tmp_path / "model")}
    assert named[sheets[0]].score == max(one.score for one in named.values())
    word = named[sheets[0]].name
    again = run(f"{base} --output {tmp_path}/again --concept {word.split()[0]}", capsys)
    assert sheets[0] in [int(path[-9:-4]) for path in again["sheets"]]


@pytest.mark.parametrize("flag", ["samples", "top", "heatmaps", "heatmap_images", "shifts"])
def test_impossible_numbers_of_pictures_are_refused_before_anything_is_done(world, tmp_path, capsys, flag):
    command = f"concepts --model {world[2]}/model --features {world[2]}/features --output {tmp_path}/out --{flag} -2"
    assert main(command.split()) == 2
    assert f"`{flag}` must be at least" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_names_a_latent_by_the_word_that_raises_it(world):
    model, encoders, _ = world
    words = ["circle", "star", "red"]
    rows = torch.from_numpy(encoders["clip_txt"].encode([f"a {word}" for word in words]))
    values = model.preactivations("clip_txt", rows, torch.arange(32)).detach()
    found = vocabulary_evidence(model, encoders["clip_txt"], words, prompt="a {}")
    for latent, evidence in found.items():
        column = values[:, latent].numpy()
        assert {one.name for one in evidence} == {word for word, value in zip(words, column, strict=True) if value > 0}
        if evidence and column.max() > 0:
            assert evidence[0].name == words[int(column.argmax())]
            assert evidence[0].z == pytest.approx((column.max() - column.mean()) / column.std(), abs=1e-3)
    with pytest.raises(ValueError, match="needs a text stream"):
        vocabulary_evidence(model, encoders["dino"], words)


@pytest.mark.parametrize("parametrisation", ["fourier", "pixels"])
def test_maximised_images_fire_the_latent_through_the_real_way_in(world, parametrisation):
    """The images, saved as 8-bit pictures and encoded anew, fire the latent more than any random image does."""
    model, encoders, _ = world
    settings = MaximisationSettings(steps=40, starts=2, random_images=16, parametrisation=parametrisation)
    found = maximise_latent(model, encoders, 7, settings)
    assert list(found) == ["dino", "clip_img"]
    for name, stream in found.items():
        assert stream.activations == sorted(stream.activations, reverse=True)
        rows = encoders[name].rows(encoders[name].prepare(stream.images))
        again = model.preactivations(name, rows, torch.tensor([7]))[:, 0].detach()
        np.testing.assert_allclose(again.numpy(), stream.activations, atol=0.02)
        assert again[0] > stream.random.max()
    assert all(parameter.grad is None for parameter in model.parameters())
    repeated = maximise_latent(model, {"dino": encoders["dino"]}, 7, settings)["dino"]
    assert repeated.activations == found["dino"].activations
    with pytest.raises(ValueError, match="there is no latent 32"):
        maximise_latent(model, encoders, 32)
    with pytest.raises(ValueError, match="a stream that encodes images"):
        maximise_latent(model, {"clip_txt": encoders["clip_txt"]}, 3)


def test_streams_of_patch_tokens_are_maximised_over_their_tokens(tmp_path):
    folder = str(save_vit(tmp_path / "vit"))
    encoder = StreamEncoder("x", folder, "image", pooling="tokens", grid=(3, 3))
    model = SparcModel(SparcConfig(streams=[encoder.record], num_latents=16, k=4, auxk=4)).eval()
    found = maximise_latent(model, {"x": encoder}, 2, MaximisationSettings(steps=3, starts=1, random_images=4))["x"]
    rows = encoder.rows(encoder.prepare(found.images))
    assert rows.shape == (9, 16)
    mean = model.preactivations("x", rows, torch.tensor([2])).mean().item()
    assert mean == pytest.approx(found.activations[0], abs=0.02)


def test_streams_of_patch_tokens_are_explained_by_their_codes(world, tmp_path):
    _, encoders, _ = world
    folder = str(save_vit(tmp_path / "vit"))
    tokens = StreamEncoder("tokens", folder, "image", pooling="tokens", grid=(3, 3))
    used = {"tokens": tokens, "dino": encoders["dino"]}
    usae = {"objective": "usae", "selection": "local", "auxk": 8, "auxk_coef": 0.1}
    model = SparcModel(SparcConfig(streams=[one.record for one in used.values()], num_latents=16, k=4, **usae)).eval()
    found = explain_sample(model, used, SCENE.image, "", {"one": [3]}).targets[0]
    by_token = model.encode({"tokens": tokens.rows(tokens.prepare([SCENE.image]))})["tokens"].to_dense()
    largest = by_token[:, 3].max().item()
    assert found.notes["tokens"] == (f"{largest:.2f}" if largest > 0 else "not active")
    assert found.maps["tokens"].shape == (64, 64) if largest > 0 else found.maps["tokens"] is None
    similar = image_maps(model, used, [SCENE.image], [SimilarityTarget("tokens", SCENE.image)], "patch_codes")
    assert np.isfinite(similar["dino"]).all()


def test_heatmaps_of_a_dataset_that_has_neither_images_nor_names(world, tmp_path, capsys):
    model, encoders, _ = world
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(20, one.hidden_size)).astype(np.float32) for name, one in encoders.items()}
    streams = {name: one.record for name, one in encoders.items()}
    FeatureDataset.from_arrays(arrays, streams=streams).save(tmp_path / "bare")
    SCENE.image.save(tmp_path / "a.png")
    base = f"concepts --model {tmp_path}/model --features {tmp_path}/bare --heatmaps 2 --shifts 1"
    told = run(f"{base} --output {tmp_path}/out --images {tmp_path}/a.png", capsys)
    assert (list(told), len(told["heatmaps"]["latents"])) == (["heatmaps"], 2)
    assert not (tmp_path / "model" / "concepts.json").exists()
    assert main(f"{base} --output {tmp_path}/more".split()) == 2
    assert "has no images to draw heatmaps on" in capsys.readouterr().err


def shown_texts(figure) -> list[tuple[str, Any]]:
    """Every text of a figure, with its extent in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    artists = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().strip())
    visible = [one for one in artists if one.axes is None or one.axes.axison or one in one.axes.texts]
    return [(one.get_text(), one.get_window_extent(renderer)) for one in visible]


def overlaps(figure) -> list[tuple[str, str]]:
    texts = shown_texts(figure)
    pixels = figure.bbox
    for words, place in texts:
        assert place.x0 >= -1, words
        assert place.y0 >= -1, words
        assert place.x1 <= pixels.x1 + 1, words
        assert place.y1 <= pixels.y1 + 1, words
    return [
        (words, others)
        for (words, place), (others, other) in itertools.combinations(texts, 2)
        if min(place.x1, other.x1) - max(place.x0, other.x0) > 1
        and min(place.y1, other.y1) - max(place.y0, other.y0) > 1
    ]


def test_no_text_of_a_picture_lies_on_another():
    image, heat = Image.new("RGB", (40, 30), "teal"), np.random.default_rng(0).random((30, 40))
    caption = "a red circle beside a very large blue star on a light background with a long tail " * 2
    words = [(word, 0.1 * at, 0, len(caption)) for at, word in enumerate(caption.split())]
    rows = [
        map_plots.ExplainedTarget(
            "dark background (latents 105, 240, 17, 242, 138, 177, 89, 184, 84, 5, 78, 115, 116, 117, 118, 119, 120)",
            {"dino": heat, "clip_img": None, "siglip": None},
            {"clip_txt": words, "other": words},
            {"dino": "0.23", "clip_img": "not active"},
            frozenset({"clip_img"}),
        ),
        map_plots.ExplainedTarget(
            "agreement of image and clip_txt",
            {"dino": heat, "clip_img, embeddings (baseline)": heat},
            {"clip_txt": []},
        ),
    ]
    remarks = ["dino has no map: no attention maps here", "clip_txt reads only the beginning: " + "far " * 200]
    figure = map_plots.explanation_panel(image, caption, rows, remarks)
    assert overlaps(figure) == []
    told = {words for words, _ in shown_texts(figure)}
    assert {"dino (0.23)", "clip_img (not active)", "no such map", "largest value of each map"} <= told
    cells = [map_plots.SheetCell(image, heat, note="0.231")] * 2, [map_plots.SheetCell(None, text=caption, note="0.1")]
    sheet = map_plots.contact_sheet(
        "latent 12: a name of several words", {"dino": cells[0], "clip_txt": cells[1], "c": []}
    )
    assert overlaps(sheet) == []
    maps = {
        ("latent 1\ndark background, and more words", stream): np.stack([heat] * 3) for stream in ("dino", "clip_img")
    }
    grid = map_plots.heatmap_grid([image] * 3, maps, {key: [0.2, 0.0, 0.1] for key in maps})
    assert overlaps(grid) == []
    assert [words for words, _ in shown_texts(grid)].count("not active") == 2


def test_what_is_not_active_has_no_map_in_a_picture():
    """Pale, as the image is, and without the map's colours."""
    image, heat = Image.new("RGB", (32, 32), (10, 60, 10)), np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    target = map_plots.ExplainedTarget("one", {"a": heat, "b": None}, {}, {"b": "not active"}, frozenset({"b"}))
    figure = map_plots.explanation_panel(image, "", [target])
    first, active, inactive, scale = (np.asarray(axis.images[0].get_array(), int) for axis in figure.axes)
    assert len(np.unique(active.reshape(-1, 3), axis=0)) > 5
    assert len(np.unique(inactive.reshape(-1, 3), axis=0)) == 1
    assert (inactive > first).all()
    assert scale.shape[0] == 1
    # The scale has the colours of the maps: from the image's to those of the largest value.
    assert np.abs(scale[0, -1] - map_plots.overlay(image, heat)[-1, -1]).max() < 60


def test_an_overlay_is_strongest_where_the_map_is():
    heat = np.zeros((8, 8), np.float32)
    heat[2, 3] = 1
    picture = map_plots.overlay(Image.new("L", (8, 8), 60), heat)
    changed = np.abs(picture.astype(int) - 60).sum(axis=2)
    assert np.unravel_index(changed.argmax(), changed.shape) == (2, 3)
    assert (changed > 5).sum() == 1


@torch.no_grad()
def test_retrieve_finds_what_shares_concepts(world, tmp_path, capsys):
    model, _, folder = world
    base = f"retrieve --model {folder}/model --features {folder}/features --count 4"
    features = FeatureDataset.load(folder / "features")
    rows = {name: torch.from_numpy(features.array(name)) for name in features.stream_names}
    dense = {name: model.encode({name: value}, "local")[name].to_dense() for name, value in rows.items()}
    unit = {name: value / value.norm(dim=1, keepdim=True).clamp(min=1e-8) for name, value in dense.items()}
    told = run(f"{base} --row 3 --source dino", capsys)
    assert (told["source"], list(told["matches"])) == ("dino", ["dino", "clip_img", "clip_txt"])
    expected = unit["clip_img"] @ unit["dino"][3]
    expected[3] = 0
    found = told["matches"]["clip_img"]
    assert [match["row"] for match in found] == expected.argsort(descending=True, stable=True)[:4].tolist()
    assert [match["similarity"] for match in found] == pytest.approx(
        expected.sort(descending=True).values[:4], abs=1e-4
    )
    assert found[0]["id"] == features.ids[found[0]["row"]]
    features.image(3).save(tmp_path / "query.png")
    same = run(f"{base} --image {tmp_path}/query.png --source dino --target dino", capsys)["matches"]["dino"]
    assert (same[0]["row"], same[0]["similarity"]) == (3, pytest.approx(1, abs=1e-4))
    by_text = run(f"{base} --text {features.text[5].split()[0]} --target clip_img", capsys)
    assert by_text["source"] == "clip_txt"
    for flags, message in (
        ("", "give one of"),
        ("--text a --row 3", "give one of"),
        ("--row 99", "numbered from 0 to 23"),
        ("--text a --source dino", "encodes text; those that do are ['clip_txt']"),
        ("--row 1 --target ears", "no streams ['ears']"),
    ):
        assert main(f"{base} {flags}".split()) == 2
        assert message in capsys.readouterr().err
