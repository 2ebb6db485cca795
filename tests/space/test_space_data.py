"""The index and what is read from it: facts of latents, samples, retrieval, maps; opening and caching."""

import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROOT
from PIL import Image

from sparc_hf import SparcModel
from sparc_hf.codes.concepts import load_concepts
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.views import seen_images
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.maps.explanation import active_latents
from sparc_hf.space import data as space_data
from sparc_hf.space.data import ORDERS, card_text, open_space, with_own_modules
from sparc_hf.space.fragments import (
    compare_page,
    explanation_page,
    heat_image,
    latent_page,
    latent_samples,
    marked_words,
    matches_page,
    retrieval_page,
)
from sparc_hf.space.index import index_name, open_index
from sparc_hf.space.seen_maps import explain, latent_maps


@pytest.fixture(scope="module")
def cache(space_cache):
    return space_cache


@pytest.fixture(scope="module")
def data(small_space):
    return small_space


def test_the_demo_is_prepared_once(data, cache, monkeypatch):
    monkeypatch.setattr(space_data, "run_demo", None)
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}
    again = open_space(cache=str(cache))
    assert again.index.folder == data.index.folder
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_figures_are_those_of_the_codes(data):
    rows = {name: torch.from_numpy(data.features.array(name)) for name in data.streams}
    for stream in data.streams:
        code = data.model.encode({stream: rows[stream]})[stream].to_dense().detach().numpy()
        fires = (code > 0).mean(axis=0)
        assert data.index.statistics[f"frequency/{stream}/single"] == pytest.approx(fires)
        for latent in np.flatnonzero(fires)[:10].tolist():
            best = data.latent(latent).samples[stream]
            assert [value for _, value in best] == pytest.approx(np.sort(code[:, latent])[::-1][: len(best)], abs=1e-5)
            assert all(code[row, latent] == pytest.approx(value, abs=1e-5) for row, value in best)


def test_nearest_atoms(data):
    atoms = data.model.atoms["dino"].detach().numpy()
    near = data.latent(3).neighbours["dino"]
    cosines = atoms @ atoms[3]
    cosines[3] = -2
    assert near[0][0] == cosines.argmax()
    assert near[0][1] == pytest.approx(cosines.max(), abs=1e-5)


def test_latents_are_found_and_sorted(data):
    everything = data.find_latents()
    assert everything
    assert data.find_latents("7") == [7]
    assert data.find_latents("999999") == []
    assert data.find_latents("nosuchword") == []
    named = next(latent for latent in everything if data.name(latent))
    word = data.name(named).split()[0]
    assert named in data.find_latents(word.upper())
    for order, column in ORDERS.items():
        found = data.find_latents("", order)
        assert sorted(found) == sorted(everything)
        if order in ("energy", "entropy"):
            values = data.index.statistics[column][found]
            assert (np.diff(values) <= 0).all()
    with pytest.raises(ValueError, match="ordered by one of"):
        data.find_latents("", "beauty")


def test_a_name_opens_a_latent_of_that_name_under_every_order(data):
    names = {concept.name for concept in data.index.concepts.values() if concept.name is not None}
    assert len(names) > 10
    for name in names:
        for order in ORDERS:
            first = data.match_latents(name, order)[0]
            assert data.name(first.latent) == name, (name, order)
            assert first.reason == f'name "{name}"'


def test_retrieval_by_input_equals_retrieval_by_sample(data):
    by_row = data.retrieve("clip_txt", "clip_img", 5)
    by_text = data.retrieve("clip_txt", "clip_img", data.caption(5))
    assert [match.row for match in by_row] == [match.row for match in by_text]
    assert [match.similarity for match in by_row] == pytest.approx([match.similarity for match in by_text], abs=1e-4)
    assert data.retrieve("clip_img", "clip_img", data.image(5))[0].row == 5
    assert 5 not in [match.row for match in data.retrieve("clip_img", "clip_img", 5)]
    with pytest.raises(ValueError, match="there is no stream 'sound'"):
        data.retrieve("sound", "dino", 1)


def test_explaining_a_concept_and_a_similarity(data):
    image, caption = data.image(2), data.caption(2)
    latent = data.strongest(data.code("clip_img", image))[0][0]
    concept = explain(data, image, caption, latent=latent)
    assert list(concept.views) == ["dino", "clip_img"]
    assert list(concept.targets[0].words) == ["clip_txt"]
    assert list(concept.baselines) == ["clip_img"]
    alike = explain(data, image, caption)
    assert [target.latents for target in alike.targets] == [()]
    assert list(alike.targets[0].grids) == ["dino", "clip_img"]
    assert list(alike.targets[0].words) == ["clip_txt for dino", "clip_txt for clip_img"]
    assert not np.array_equal(alike.targets[0].grids["clip_img"], concept.targets[0].grids["clip_img"])
    for target in (*concept.targets, *alike.targets):
        assert all([word.word for word in words] == caption.split() for words in target.words.values())
        assert all(np.isfinite(grid).all() and grid.min() >= 0 for grid in target.grids.values())
    alone = explain(data, image)
    assert alone.targets[0].latents == tuple(active_latents(alone.codes, 1))
    assert explain(data, None, caption).views == {}
    with pytest.raises(ValueError, match="take image and text"):
        explain(data, None, "")


def test_a_retrieval_encodes_its_query_once(data, monkeypatch):
    asked = []
    real = StreamEncoder.rows
    monkeypatch.setattr(StreamEncoder, "rows", lambda self, inputs: (asked.append(self.name), real(self, inputs))[1])
    retrieval_page(data, "clip_txt", "clip_img", "a red circle")
    retrieval_page(data, "dino", "clip_img", data.image(3))
    assert asked == ["clip_txt", "dino"]


def test_whoever_only_encodes_waits_for_no_explanation(data):
    with data.explaining, ThreadPoolExecutor(1) as pool:
        found = pool.submit(data.retrieve, "clip_txt", "clip_img", "a red circle").result(timeout=20)
    assert found


def test_encoding_beside_explanations_changes_neither(data):
    images = [data.image(row) for row in range(4)]
    captions = [data.caption(row) for row in range(4)]
    codes = [
        [data.code("clip_img", one), data.code("clip_txt", text)] for one, text in zip(images, captions, strict=True)
    ]
    before = [explain(data, one, text) for one, text in zip(images, captions, strict=True)]

    def encode(turn: int) -> bool:
        at = turn % len(images)
        found = [data.code("clip_img", images[at]), data.code("clip_txt", captions[at])]
        return all(np.array_equal(one, two) for one, two in zip(found, codes[at], strict=True))

    def explained(turn: int) -> bool:
        at = turn % len(images)
        found = explain(data, images[at], captions[at])
        (target,), (expected,) = found.targets, before[at].targets
        same_maps = all(np.array_equal(target.grids[name], grid) for name, grid in expected.grids.items())
        return same_maps and target.words == expected.words

    with ThreadPoolExecutor(6) as pool:
        told = [pool.submit(encode if turn % 3 else explained, turn) for turn in range(60)]
        assert all(one.result() for one in told)


def test_explained_encoders_share_their_weights(data):
    for name, encoder in data.encoders.items():
        other = data.watched_encoders[name]
        assert other.model is not encoder.model
        assert [id(one) for one in other.model.parameters()] == [id(one) for one in encoder.model.parameters()]
    assert data.watched_encoders["clip_img"].model is data.watched_encoders["clip_txt"].model


def test_words_that_are_not_read_are_told(data):
    long = "a red circle above " + "a small blue square beside " * 30 + "the very last words"
    unread = data.encoders["clip_txt"].inputs_of.unread
    end = unread(long)
    assert end.endswith("the very last words")
    read = long[: long.rindex(end)]
    assert np.array_equal(data.code("clip_txt", long), data.code("clip_txt", read))
    assert not np.array_equal(data.code("clip_txt", read), data.code("clip_txt", read.strip().rsplit(" ", 1)[0]))
    assert unread("a red circle") == ""
    assert unread("") == ""
    assert explain(data, None, long).remarks[0].endswith(end)
    page = retrieval_page(data, "clip_txt", "clip_img", long)
    assert f"not: {end}</p>" in page
    assert "class=remark" not in retrieval_page(data, "clip_txt", "clip_img", "a red circle")


def test_a_backbone_without_maps_shows_plain_images(data, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no attention maps here")

    monkeypatch.setattr("sparc_hf.space.seen_maps.image_maps", refuse)
    monkeypatch.setattr("sparc_hf.maps.explanation.image_maps", refuse)
    assert latent_maps(data, 5, {"dino": [1]}) == {}
    found = explain(data, data.image(1), data.caption(1))
    assert found.targets[0].grids == {}
    assert "dino has no map: no attention maps here" in found.remarks
    assert found.codes["dino"].any()
    assert 'class="heat"' not in explanation_page(data, found)


def test_image_streams_alone_explain_images(data, monkeypatch):
    images = {name: encoder for name, encoder in data.encoders.items() if encoder.modality == "image"}
    monkeypatch.setattr(data, "encoders", images)
    monkeypatch.setattr(data, "watched_encoders", with_own_modules(images))
    found = explain(data, data.image(1), "a caption that no stream reads")
    assert found.targets[0].latents
    assert list(found.views) == ["dino", "clip_img"]
    assert found.targets[0].words == {}


def test_maps_of_top_samples_cover_what_the_encoder_sees(data):
    maps = latent_maps(data, data.find_latents()[0], {"dino": [1, 4], "clip_txt": [1]})
    assert list(maps) == ["dino"]
    seen = maps["dino"][1]
    # The demo's encoders take the scene as it is.
    assert np.abs(np.asarray(seen.image, int) - np.asarray(data.image(4), int)).max() <= 1
    assert seen.heat.shape[0] == seen.heat.shape[1]
    assert seen_images(data.encoders["clip_img"], [data.image(4)])[0].size == (64, 64)


def test_heat_is_transparent_where_there_is_none():
    heat = np.asarray(heat_image(np.array([[0, 1], [2, 4]], np.float32)))
    assert heat[..., 3].tolist() == [[0, 64], [128, 255]]
    assert np.asarray(heat_image(np.zeros((2, 2), np.float32)))[..., 3].max() == 0


def test_everything_from_outside_is_escaped(data, monkeypatch):
    evil = '<img src=x onerror="alert(1)">'
    monkeypatch.setattr(data, "caption", lambda row: evil)
    monkeypatch.setattr(data, "name", lambda latent: evil)
    facts = data.latent(data.find_latents()[0])
    found = explain(data, None, f"red {evil}", latent=1)
    pages = [
        latent_page(data, facts),
        latent_samples(data, facts),
        matches_page(data, "clip_img", data.retrieve("clip_txt", "clip_img", "red circle")),
        compare_page(data, "joint"),
        marked_words(f"red {evil}", found.targets[0].words["clip_txt"]),
    ]
    for text in pages:
        assert "<img src=x" not in text
        assert 'onerror="' not in text


def test_marked_words_give_the_caption_back(data):
    caption = "a <red> circle,  and & 'blue'"
    found = explain(data, None, caption, latent=1)
    assert (
        html.unescape(re.sub(r"</?mark[^>]*>", "", marked_words(caption, found.targets[0].words["clip_txt"])))
        == caption
    )


def test_features_without_images_labels_or_text(data, tmp_path):
    bare = FeatureDataset.from_arrays(
        {name: data.features.array(name) for name in data.streams}, streams=data.model.config.streams
    )
    index = open_index(data.model, bare, tmp_path)
    assert index.thumbnail(0) is None
    assert np.isnan(index.statistics["alignment/single"]).all()
    shown = space_data.SpaceData(data.model, bare, index)
    facts = shown.latent(shown.find_latents()[0])
    assert "<img" not in latent_samples(shown, facts)
    assert shown.retrieve("dino", "clip_img", 3)
    with pytest.raises(ValueError, match="does not say which encoder"):
        shown.code("dino", data.image(1))


def test_names_that_come_with_the_model_win(data, tmp_path):
    folder = data.index.folder
    concepts = load_concepts(folder)
    renamed = [type(one)(**vars(one) | {"name": "mine"}) for one in concepts[:1]]
    index = open_index(data.model, data.features, tmp_path, names=renamed)
    assert index.concepts[renamed[0].latent].name == "mine"
    assert len(index.concepts) == len(concepts)


def test_a_failed_index_leaves_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sparc_hf.space.index._write_thumbnails", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_index(data.model, data.features, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_ones_own(data, cache, tmp_path):
    demo = next(cache.glob("demo-*"))
    own = open_space(str(demo / "model"), str(demo / "features" / "test"), str(tmp_path))
    assert own.num_latents == data.num_latents
    with pytest.raises(ValueError, match="no feature dataset to show it on"):
        open_space(str(demo / "model"), None, str(tmp_path))
    with pytest.raises(ValueError, match="no model"):
        open_space(None, str(demo / "features" / "test"), str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder nor a model on the Hub"):
        open_space("nobody/nothing", str(demo / "features" / "test"), str(tmp_path))


def test_an_index_has_the_same_name_in_every_process(data, cache):
    demo = next(cache.glob("demo-*"))
    code = (
        "from sparc_hf import SparcModel; from sparc_hf.features.dataset import FeatureDataset\n"
        "from sparc_hf.codes.concepts import load_concepts; from sparc_hf.space.index import index_name\n"
        f"model, features = SparcModel.from_pretrained({str(demo / 'model')!r}), {str(demo / 'features' / 'test')!r}\n"
        f"print(index_name(model, FeatureDataset.load(features), load_concepts({str(demo / 'model')!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == data.index.folder.name


def test_another_model_has_another_index(data, cache, tmp_path):
    other = SparcModel.from_pretrained(next(cache.glob("demo-*")) / "model").eval()
    with torch.no_grad():
        other.atoms["dino"][0] *= -1
    assert open_index(other, data.features, tmp_path).folder.name != data.index.folder.name


def changed(features: FeatureDataset, **columns) -> FeatureDataset:
    """Return the dataset with other columns."""
    table = features.table
    for name, values in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    facts = {"label_names": features.label_names, "taxonomy": features.taxonomy}
    return FeatureDataset(table, features.streams, **facts)


@pytest.mark.parametrize(
    "setting",
    [
        {"dead_threshold": 0.5},
        {"objective": "usae"},
        {"distance": "l2"},
        {"selection": "local"},
        {"k": 3},
        {"auxk_coef": 0.5},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_an_index_of_other_settings_is_not_served(data, setting, monkeypatch):
    before = index_name(data.model, data.features)
    for name, value in setting.items():
        monkeypatch.setattr(data.model.config, name, value)
    assert index_name(data.model, data.features) != before


def test_a_model_that_fires_from_another_threshold_has_other_figures(data, tmp_path, monkeypatch):
    assert open_index(data.model, data.features, tmp_path).results["single"]["universality"]["firing"] > 0
    monkeypatch.setattr(data.model.config, "dead_threshold", 1e6)
    assert open_index(data.model, data.features, tmp_path).results["single"]["universality"]["firing"] == 0


def test_an_index_of_other_rows_or_names_is_not_served(data):
    features = data.features
    at = 57
    text, ids, labels, images = (features.column(name) for name in ("text", "id", "labels", "image"))
    vectors = features.array("dino")
    vectors[at, 0] += 1
    other = Image.new("RGB", (64, 64))
    buffer = io.BytesIO()
    other.save(buffer, "PNG")
    concept = load_concepts(data.index.folder)[0]
    names = [
        index_name(data.model, one, concepts)
        for one, concepts in (
            (features, None),
            (changed(features, text=[*text[:at], "another caption", *text[at + 1 :]]), None),
            (changed(features, id=[*ids[:at], "another", *ids[at + 1 :]]), None),
            (changed(features, labels=[*labels[:at], [0], *labels[at + 1 :]]), None),
            (changed(features, dino=list(vectors)), None),
            (changed(features, image=[*images[:at], {"bytes": buffer.getvalue()}, *images[at + 1 :]]), None),
            (with_facts(features, taxonomy=None), None),
            (with_facts(features, taxonomy={"thing": features.label_names}), None),
            (with_facts(features, label_names=features.label_names[::-1]), None),
            (features.select(range(len(features) - 1)), None),
            (features, [concept]),
            (features, [replace(concept, score=concept.score + 1)]),
            (features, [replace(concept, labels=[])]),
        )
    ]
    assert len(set(names)) == len(names)


def with_facts(features: FeatureDataset, **facts) -> FeatureDataset:
    known = {"label_names": features.label_names, "taxonomy": features.taxonomy}
    return FeatureDataset(features.table, features.streams, **known | facts)


def test_cards(data, tmp_path):
    assert data.card.startswith("# SPARC on the embedded world")
    assert "data:image/png;base64," in data.card
    shutil.copy(next(data.index.folder.parent.parent.glob("demo-*/model/*.png")), tmp_path / "secret.png")
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("---\na: b\n---\n# Card\n![x](../secret.png) ![y](none.png)\n")
    assert card_text(tmp_path / "card" / "README.md") == "# Card\n![x](../secret.png) ![y](none.png)"
    assert card_text(tmp_path / "none.md") == ""


def test_results_of_both_encodings(data):
    assert set(data.index.results) >= {"joint", "single"}
    json.dumps(data.index.results)
