"""Every kind of source: COCO, Open Images, ImageNet folders, streams; labels and taxonomy along."""

import json

import numpy as np
import pytest
from PIL import Image

from sparc_hf.features.sources.coco import open_coco
from sparc_hf.features.sources.hierarchy import hierarchy_of_codes
from sparc_hf.features.sources.imagenet import open_imagenet
from sparc_hf.features.sources.open_images import class_names, open_open_images
from sparc_hf.features.sources.source import find_column, open_source, schema_of
from sparc_hf.features.stream_records import parse_streams


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def coco(tmp_path):
    images = [{"id": 7, "file_name": "seven.jpg"}, {"id": 3, "file_name": "three.jpg"}]
    captions = [(1, 3, "a cat "), (2, 7, "a dog"), (3, 3, "two cats")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, image, text in captions]
    write(tmp_path / "captions.json", {"images": images, "annotations": annotations})
    categories = [
        {"id": 18, "name": "dog", "supercategory": "animal"},
        {"id": 3, "name": "car", "supercategory": "vehicle"},
        {"id": 17, "name": "cat", "supercategory": "animal"},
    ]
    boxes = [
        {"image_id": 3, "category_id": 17},
        {"image_id": 3, "category_id": 18},
        {"image_id": 3, "category_id": 17},
    ]
    write(tmp_path / "instances.json", {"images": images, "annotations": boxes, "categories": categories})
    return tmp_path


def test_coco_rows_are_images_or_captions(coco):
    source = open_coco(coco / "captions.json", coco / "images", instances=coco / "instances.json")
    assert source.dataset["id"][:] == ["7", "3"]
    assert source.dataset["captions"][:] == [["a dog"], ["a cat", "two cats"]]
    assert source.dataset["image"][0]["path"] == str(coco / "images" / "seven.jpg")
    assert (source.label_names, source.dataset["labels"][:]) == (["dog", "car", "cat"], [[], [0, 2]])
    assert source.taxonomy == {
        "LabelName": "entity",
        "Subcategory": [
            {"LabelName": "animal", "Subcategory": [{"LabelName": "dog"}, {"LabelName": "cat"}]},
            {"LabelName": "vehicle", "Subcategory": [{"LabelName": "car"}]},
        ],
    }
    source = open_coco(coco / "captions.json", coco / "images", rows="caption")
    assert source.dataset["id"][:] == ["7-2", "3-1", "3-3"]
    assert source.dataset["caption"][:] == ["a dog", "a cat", "two cats"]
    assert (source.labels_column, source.label_names) == (None, None)
    assert find_column(source.dataset, "image") == "image"


def test_bad_coco_files(coco):
    with pytest.raises(ValueError, match=r"cannot read .*none\.json"):
        open_coco(coco / "none.json", coco)
    with pytest.raises(ValueError, match="not in COCO's format"):
        open_coco(coco / "instances.json", coco, instances=coco / "captions.json")
    with pytest.raises(ValueError, match="`rows` must be image or caption"):
        open_coco(coco / "captions.json", coco, rows="word")
    write(coco / "lost.json", {"images": [], "annotations": [{"id": 1, "image_id": 5, "caption": "x"}]})
    with pytest.raises(ValueError, match="caption for image 5, which it does not list"):
        open_coco(coco / "lost.json", coco)


def open_images_tree(root, tables, taxonomy):
    """The folder that the earlier project's tables describe."""
    rows = [["ImageID", "Source", "LabelName", "Confidence"], *tables["annotations"]]
    write(
        root / "labels/train-annotations-human-imagelabels-boxable.csv", "\n".join(",".join(map(str, r)) for r in rows)
    )
    rows = [["LabelName", "DisplayName"], *tables["csv_rows"]]
    write(root / "labels/oidv7-class-descriptions-boxable.csv", "\n".join(",".join(row) for row in rows))
    write(root / "labels/bbox_labels_600_hierarchy.json", taxonomy)
    narratives = {image: [{"caption": text} for text in texts] for image, texts in tables["captions"].items()}
    write(root / "captions/train/simplified_open_images_train_localized_narratives.json", narratives)
    (root / "images/train").mkdir(parents=True)


def test_open_images_labels_equal_the_earlier_projects(golden, tmp_path):
    tables = json.loads((golden / "legacy/open_images_tables.json").read_text())
    tables["captions"] = {image: ["text"] * count for image, count in tables["captions_per_image"].items()}
    taxonomy = json.loads((golden / "legacy/taxonomy.json").read_text())
    open_images_tree(tmp_path, tables, taxonomy)
    source = open_open_images(tmp_path, "train")
    expected = np.load(golden / "legacy/labels.npz")
    assert source.label_names == expected["class_names"].tolist()
    ids = [f"{i}-{n}" for i, n in zip(expected["image_ids"], expected["caption_index"], strict=True)]
    assert source.dataset["id"][:] == ids
    made = np.zeros(expected["labels"].shape, np.uint8)
    for row, labels in enumerate(source.dataset["labels"]):
        made[row, labels] = 1
    np.testing.assert_array_equal(made, expected["labels"])
    assert source.taxonomy["Subcategory"][0]["LabelName"] == "Animal"


def test_open_images(tmp_path):
    tables = {
        "captions": {"b": ["two dogs", " a dog "], "a": ["a car"]},
        "csv_rows": [["/m/1", "Dog"], ["/m/2", "Car"], ["/m/3", "Cup"]],
        "annotations": [["b", "v", "/m/1", 1], ["b", "v", "/m/2", 0], ["zz", "v", "/m/2", 1], ["a", "v", "/m/9", 1]],
    }
    open_images_tree(tmp_path, tables, {"LabelName": "/m/0", "Subcategory": [{"LabelName": "/m/1"}]})
    source = open_open_images(tmp_path, "train", rows="image")
    assert source.dataset["captions"][:] == [["two dogs", "a dog"], ["a car"]]
    assert source.dataset["image"][1]["path"] == str(tmp_path / "images/train/a.jpg")
    assert (source.label_names, source.dataset["labels"][:]) == (["Car", "Cup", "Dog"], [[2], []])
    # Classes outside the hierarchy stay in the taxonomy, under its root.
    assert [part["LabelName"] for part in source.taxonomy["Subcategory"]] == ["Dog", "Car", "Cup"]
    with pytest.raises(ValueError, match=r"`split` must be one of .*'dev'"):
        open_open_images(tmp_path, "dev")
    with pytest.raises(ValueError, match=r"cannot read .*validation"):
        open_open_images(tmp_path, "val")
    (tmp_path / "labels/second-class-descriptions.csv").write_text("/m/1,Dog\n")
    with pytest.raises(ValueError, match="several files"):
        open_open_images(tmp_path, "train")
    assert class_names(tmp_path / "labels/second-class-descriptions.csv") == {"/m/1": "Dog"}
    write(tmp_path / "labels/bad.csv", "ImageID,Class\na,b\n")
    files = {"class_descriptions": tmp_path / "labels/second-class-descriptions.csv"}
    with pytest.raises(ValueError, match=r"cannot read the labels .*bad\.csv"):
        open_open_images(tmp_path, "train", label_files=[tmp_path / "labels/bad.csv"], **files)
    write(tmp_path / "narratives.json", [1, 2])
    with pytest.raises(ValueError, match="simplified form"):
        open_open_images(tmp_path, "train", captions=tmp_path / "narratives.json", **files)


def picture(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_imagenet_tree(tmp_path):
    for name in ("train/n02/b.JPEG", "train/n01/z.JPEG", "train/n01/a.JPEG", "train/n03/c.png", "val/n01/v.JPEG"):
        picture(tmp_path / name)
    (tmp_path / "train/n01/notes.txt").write_text("x")
    source = open_imagenet(tmp_path, "train")
    assert source.dataset["id"][:] == ["n01/a", "n01/z", "n02/b", "n03/c"]
    assert (source.dataset["label"][:], source.label_names) == ([0, 0, 1, 2], ["n01", "n02", "n03"])
    assert source.taxonomy is None
    assert len(open_imagenet(tmp_path, "val").dataset) == 1
    (tmp_path / "names.txt").write_text("n01 crane, bird\nn02 tench, Tinca tinca\nn03 crane\n")
    write(tmp_path / "tree.json", {"LabelName": "n00", "Subcategory": [{"LabelName": "n01"}, {"LabelName": "n02"}]})
    source = open_imagenet(tmp_path, "train", class_names=tmp_path / "names.txt", hierarchy=tmp_path / "tree.json")
    assert source.label_names == ["crane (n01)", "tench", "crane (n03)"]
    names = [part["LabelName"] for part in source.taxonomy["Subcategory"]]
    assert names == ["crane (n01)", "tench", "crane (n03)"]
    with pytest.raises(ValueError, match="there is no folder"):
        open_imagenet(tmp_path, "test")


def test_folders_in_folders_are_a_taxonomy(tmp_path):
    for name in ("animal/dog/poodle/a.jpg", "animal/cat/b.jpg", "car/c.jpg"):
        picture(tmp_path / "tree" / name)
    source = open_imagenet(tmp_path / "tree")
    assert source.label_names == ["cat", "poodle", "car"]
    assert source.taxonomy["Subcategory"][0] == {
        "LabelName": "animal",
        "Subcategory": [{"LabelName": "cat"}, {"LabelName": "dog", "Subcategory": [{"LabelName": "poodle"}]}],
    }
    picture(tmp_path / "tree" / "d.jpg")
    with pytest.raises(ValueError, match="outside of class folders"):
        open_imagenet(tmp_path / "tree")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in class folders"):
        open_imagenet(tmp_path / "empty")
    with pytest.raises(ValueError, match="made of objects with `LabelName`"):
        hierarchy_of_codes({"name": "x"}, {})


def test_streams_of_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"caption": "a", "n": 1}\n{"caption": "b", "n": 2}\n')
    stream = open_source(str(tmp_path / "rows.jsonl"), "train", streaming=True)
    assert set(schema_of(stream)) == {"caption", "n"}
    assert find_column(stream, "text") == "caption"
    with pytest.raises(ValueError, match="no image column among"):
        find_column(stream, "image")


def test_a_stream_string_may_name_a_revision(tmp_path):
    record = parse_streams(["a=org/model@v2:image:tokens"])[0]
    assert record == {
        "name": "a", "encoder": "org/model", "modality": "image", "revision": "v2", "pooling": "tokens",
    }  # fmt: skip
    (tmp_path / "x@y").mkdir()
    assert "revision" not in parse_streams([f"a={tmp_path}/x@y:image"])[0]
