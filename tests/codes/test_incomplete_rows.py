"""Codes of rows that lack streams, and commands on datasets that have such rows."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import planted_features, tiny_model

from sparc_hf.cli import main
from sparc_hf.codes.code_table import CodeTable, code_batches, encode_features
from sparc_hf.codes.incomplete import with_complete_rows
from sparc_hf.evaluation.retrieval import model_ranks
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model, evaluate_models
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.hub.cards import write_dataset_card, write_model_card
from sparc_hf.space.data import open_space
from sparc_hf.space.fragments import compare_page
from sparc_hf.space.index import open_index
from sparc_hf.training.imputation import add_imputation

ROWS = 260


def masks() -> dict[str, np.ndarray]:
    """A fifth of the rows lacks each of two streams, the first and the last among them."""
    draws = np.random.default_rng(4)
    dino, text = draws.random(ROWS) > 0.2, draws.random(ROWS) > 0.2
    dino[[0, 1]], text[[ROWS - 1, 64]] = False, False
    return {"dino": dino, "clip_txt": text}


@pytest.fixture(scope="module")
def complete() -> FeatureDataset:
    return planted_features(ROWS)


@pytest.fixture(scope="module")
def incomplete(complete) -> FeatureDataset:
    return FeatureDataset.from_arrays(
        {name: complete.array(name) for name in complete.stream_names},
        streams=complete.streams,
        present=masks(),
        ids=complete.ids,
        labels=complete.labels_csr(),
        label_names=complete.label_names,
    )


@pytest.fixture(scope="module")
def model(complete):
    made = tiny_model(3)
    add_imputation(made, complete)
    return made


@pytest.fixture(scope="module")
def folders(model, incomplete, tmp_path_factory):
    root = tmp_path_factory.mktemp("incomplete")
    model.save_pretrained(root / "model")
    tiny_model(3).save_pretrained(root / "plain")
    incomplete.save(root / "features", rows_per_shard=64)
    return root


def assert_codes(table: CodeTable, stream: str, rows: np.ndarray, expected) -> None:
    np.testing.assert_allclose(
        table.csr(stream).toarray()[rows], expected.to_dense().detach().numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("selection", ["global", "local"])
def test_joint_codes_of_missing_streams_are_imputed(complete, incomplete, selection):
    model = tiny_model(3, selection=selection)
    add_imputation(model, complete)
    table = encode_features(model, incomplete, batch_size=50)
    assert len(table) == ROWS
    has = {name: incomplete.present(name) for name in incomplete.stream_names}
    whole = encode_features(model, complete)
    for name in table.streams:
        np.testing.assert_array_equal(table.given(name), has[name])
        every = np.logical_and.reduce(list(has.values()))
        np.testing.assert_array_equal(table.indices(name)[every], whole.indices(name)[every])
    for given in (["clip_img"], ["dino", "clip_img"], ["clip_img", "clip_txt"]):
        rows = np.flatnonzero(np.logical_and.reduce([has[name] == (name in given) for name in has]))
        assert len(rows) > 5
        features = {name: torch.from_numpy(complete.array(name, rows)) for name in given}
        for name, code in model.encode(features, streams=list(has)).items():
            assert_codes(table, name, rows, code)


@pytest.mark.parametrize("encoding", ["single", "single_ignoring"])
def test_a_missing_stream_alone_has_an_empty_code(model, complete, incomplete, encoding, tmp_path):
    table = encode_features(model, incomplete, encoding=encoding, batch_size=50, output=tmp_path / "codes")
    whole = encode_features(model, complete, encoding=encoding)
    for name in table.streams:
        there = incomplete.present(name)
        np.testing.assert_array_equal(table.indices(name)[there], whole.indices(name)[there])
        np.testing.assert_allclose(table.values(name)[there], whole.values(name)[there], rtol=1e-4, atol=1e-6)
        assert not table.values(name)[~there].any()
        np.testing.assert_array_equal(CodeTable.load(tmp_path / "codes").given(name), there)
    # A model without statistics of its streams does this too.
    plain = encode_features(tiny_model(3), incomplete, encoding=encoding)
    assert not plain.csr("dino").toarray()[~incomplete.present("dino")].any()


def test_a_table_with_marks_is_saved_and_read(model, incomplete, tmp_path):
    table = encode_features(model, incomplete, batch_size=50)
    table.save(tmp_path / "codes", rows_per_shard=40)
    for opened in (CodeTable.load(tmp_path / "codes"), CodeTable.load(tmp_path / "codes").rows(10, 90)):
        rows = slice(10, 90) if len(opened) == 80 else slice(None)
        for name in table.streams:
            np.testing.assert_array_equal(opened.given(name), table.given(name)[rows])
            np.testing.assert_array_equal(opened.indices(name), table.indices(name)[rows])
    assert "clip_img_given" not in table.table.column_names
    with pytest.raises(ValueError, match="no stream `beta`"):
        table.given("beta")


def test_what_cannot_be_encoded_is_refused(model, complete, incomplete, tmp_path):
    with pytest.raises(ValueError, match=r"`dino`: .*`sparc impute`.*complete_rows.*--encoding single"):
        encode_features(tiny_model(3), incomplete, output=tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
    with pytest.raises(ValueError, match=r"impute them by; keep the rows that have all"):
        encode_features(tiny_model(3, objective="usae", selection="local"), incomplete)
    # Rows that have every stream need no statistics.
    rows = encode_features(tiny_model(3), incomplete.select(incomplete.complete_rows()))
    assert rows.given("dino").all()
    two = tiny_model(2)
    pairs = FeatureDataset.from_arrays(
        {name: complete.array(name) for name in complete.stream_names},
        present={"dino": masks()["dino"], "clip_img": masks()["dino"]},
    )
    add_imputation(two, complete)
    with pytest.raises(ValueError, match=r"row 0 has none of the model's streams \['dino', 'clip_img'\]"):
        encode_features(two, pairs)


def test_what_needs_every_stream_says_so(model, incomplete, tmp_path):
    codes = encode_features(model, incomplete, encoding="single")
    for call in (
        lambda: next(code_batches(model, incomplete, "single", 50)),
        lambda: model_ranks(model, incomplete, codes),
        lambda: open_index(model, incomplete, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"rows lack the streams \['dino'.*complete_rows"):
            call()


def test_figures_are_of_complete_rows(model, incomplete, caplog):
    settings = EvaluationSettings(replicates=0, probes=False)
    rows = incomplete.complete_rows()
    alone = evaluate_model(model, incomplete.select(rows), settings)
    with caplog.at_level(logging.WARNING):
        measured = evaluate_model(model, incomplete, settings)
    assert f"the {len(rows)} of {ROWS} rows that have every stream" in caplog.text
    assert measured.results == alone.results | {"rows_left_out": ROWS - len(rows)}
    assert "rows_left_out" not in alone.results
    side_by_side = evaluate_models({"three": model, "two": tiny_model(2)}, incomplete, settings)
    assert {made.results["rows"] for made in side_by_side.values()} == {len(rows)}
    nothing = incomplete.select(np.flatnonzero(~incomplete.present("dino")))
    with pytest.raises(ValueError, match=f"evaluation needs rows .*none of the {len(nothing)} rows"):
        evaluate_model(model, nothing, settings)
    no_rows = {name: np.arange(ROWS) % 3 != place for place, name in enumerate(incomplete.stream_names)}
    disjoint = FeatureDataset.from_arrays(
        {name: np.ones((ROWS, 3)) for name in incomplete.stream_names}, present=no_rows
    )
    with pytest.raises(ValueError, match="none of the 260 rows"):
        with_complete_rows(disjoint, disjoint.stream_names, "a test")


def test_cards_tell_of_them(model, incomplete, folders, tmp_path):
    results = evaluate_model(model, incomplete, EvaluationSettings(replicates=0, probes=False)).results
    model.save_pretrained(tmp_path / "model")
    card = write_model_card(tmp_path / "model", results=results).read_text(encoding="utf-8")
    assert (
        f"On {len(incomplete.complete_rows())} held-out rows of {ROWS}, those that lack no stream, with 95 %" in card
    )
    card = write_dataset_card(tmp_path, {"train": incomplete, "test": incomplete}).read_text(encoding="utf-8")
    lacking = incomplete.rows_without
    assert f"in `train` `dino` {lacking['dino']}, `clip_txt` {lacking['clip_txt']}; in `test`" in card
    assert "\n\n\n" not in card
    whole = incomplete.select(incomplete.complete_rows())
    assert "lack" not in write_dataset_card(tmp_path, {"train": whole}).read_text(encoding="utf-8")


def test_commands(incomplete, folders, tmp_path, capsys):
    model, features = str(folders / "model"), str(folders / "features")
    common = ["--features", features, "--model"]
    assert main(["encode", *common, model, "--output", str(tmp_path / "codes")]) == 0
    assert json.loads(capsys.readouterr().out)["rows_without"] == incomplete.rows_without
    assert main(["encode", *common, str(folders / "plain"), "--output", str(tmp_path / "plain")]) == 2
    assert "sparc impute" in capsys.readouterr().err
    left_out = ROWS - len(incomplete.complete_rows())
    report = str(tmp_path / "report")
    assert (
        main(["evaluate", model, "--features", features, "--output", report, "--replicates", "0", "--no_probes"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["model"]["rows_left_out"] == left_out
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert f"({left_out} more lack a stream)" in page
    assert main(["concepts", *common, model]) == 0
    capsys.readouterr()
    concepts = json.loads((folders / "model" / "concepts.json").read_text())
    assert (concepts["rows"], concepts["rows_left_out"]) == (ROWS - left_out, left_out)
    ids = {sample for concept in concepts["concepts"].values() for sample in concept["samples"]["dino"]}
    assert ids <= {incomplete.ids[row] for row in incomplete.complete_rows()}


def test_retrieval_finds_rows_that_lack_other_streams(incomplete, folders, capsys):
    model, features = str(folders / "plain"), str(folders / "features")
    row = int(np.flatnonzero(~incomplete.present("dino") & incomplete.present("clip_txt"))[0])
    search = ["retrieve", "--model", model, "--features", features, "--count", str(ROWS), "--row", str(row)]
    assert main([*search, "--source", "clip_txt", "--target", "dino"]) == 0
    found = {match["row"] for match in json.loads(capsys.readouterr().out)["matches"]["dino"]}
    assert found
    assert found <= set(np.flatnonzero(incomplete.present("dino")).tolist())
    assert found - set(incomplete.complete_rows().tolist())
    assert main([*search, "--source", "dino"]) == 2
    assert f"row {row} (id 'sample-{row}') lacks the stream `dino`" in capsys.readouterr().err


def test_rows_are_called_by_their_number_among_all(incomplete):
    rows = with_complete_rows(incomplete, incomplete.stream_names, "a test")
    first = int(incomplete.complete_rows()[0])
    assert first > 0
    assert rows.row_name(0) == f"row {first} (id 'sample-{first}')"
    assert with_complete_rows(rows, rows.stream_names, "a test") is rows
    assert rows.rows_left_out == ROWS - len(rows)
    # Chosen twice, first for some of the streams.
    twice = with_complete_rows(with_complete_rows(incomplete, ["dino"], "a test"), incomplete.stream_names, "a test")
    assert twice.row_numbers.tolist() == incomplete.complete_rows().tolist()
    assert twice.rows_left_out == ROWS - len(twice)


def test_the_space_shows_complete_rows(folders, incomplete, tmp_path):
    data = open_space(str(folders / "model"), str(folders / "features"), cache=str(tmp_path))
    left_out = ROWS - len(incomplete.complete_rows())
    assert len(data.features) == ROWS - left_out == data.index.results["rows"]
    assert data.index.results["rows_left_out"] == left_out
    assert f"On {ROWS - left_out} samples that have every stream; {left_out} more lack one." in compare_page(
        data, "joint"
    )
