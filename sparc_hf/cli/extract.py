"""`sparc extract`: run frozen encoders over a source into a feature dataset."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sparc_hf.cli.parser import trust_remote_code_flag
from sparc_hf.encoders.stream_encoder import checked_device, load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import check_sizes, extract_features, launched_processes
from sparc_hf.features.shards import MANIFEST_NAME, check_target
from sparc_hf.features.source_columns import chosen_columns
from sparc_hf.features.sources.coco import open_coco
from sparc_hf.features.sources.imagenet import open_imagenet
from sparc_hf.features.sources.open_images import open_open_images
from sparc_hf.features.sources.source import Source, open_source
from sparc_hf.features.stream_records import parse_streams
from sparc_hf.files.folder_lock import launched_rank
from sparc_hf.files.output_folder import check_output_folder


@dataclass
class ExtractionArguments:
    """The flags of `sparc extract`."""

    source: str = field(
        metadata={
            "help": "Samples: Hub id, imagefolder folder, folder of `save_to_disk`, or parquet, csv or json file; or "
            "what `source_format` says."
        }
    )
    output: str = field(metadata={"help": "Folder of the feature dataset to make; a stopped run goes on in it."})
    encoders: list[str] = field(
        metadata={
            "help": "Streams, each as name=encoder[@revision]:modality[:pooling], where encoder is a Hub id, a "
            "folder, or demo:clip or demo:dino for the small ones inside; modality is image or text; and pooling is "
            "cls, mean, pooler or projection (default: as in the papers), or tokens for one row a patch token."
        }
    )
    source_format: Literal["dataset", "coco", "open-images", "imagenet"] = field(
        default="dataset",
        metadata={
            "help": "What the source is: dataset (anything `datasets` opens); coco (a captions JSON; needs `images`); "
            "open-images (folder with captions/, images/ and labels/); imagenet (folder of class folders)."
        },
    )
    split: str | None = field(default=None, metadata={"help": "Split of the source; needed where it has several."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the rows of a dataset as they come, without storing it first."}
    )
    images: str | None = field(
        default=None, metadata={"help": "Image folder of coco, or of this split of open-images."}
    )
    instances: str | None = field(default=None, metadata={"help": "Instances JSON of coco, for labels."})
    rows: Literal["image", "caption"] | None = field(
        default=None,
        metadata={
            "help": "One row an image, with its captions joined (default for coco), or one row a caption (default for "
            "open-images)."
        },
    )
    captions: str | None = field(default=None, metadata={"help": "Narratives JSON of open-images in simplified form."})
    label_files: list[str] | None = field(default=None, metadata={"help": "Label CSVs of open-images."})
    class_names: str | None = field(
        default=None, metadata={"help": "Class names: CSV of open-images, or `LOC_synset_mapping.txt` of imagenet."}
    )
    hierarchy: str | None = field(
        default=None, metadata={"help": "Class hierarchy JSON (LabelName, Subcategory) of open-images or imagenet."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images (default: found by its type)."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column of texts or lists of captions (default: found by its type)."}
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Column of row ids (default: `id`, if there is one)."}
    )
    labels_column: str | None = field(
        default=None, metadata={"help": "Column of class ids or lists of them (default: as the source format says)."}
    )
    keep_columns: list[str] | None = field(
        default=None, metadata={"help": "Further columns to copy, images included."}
    )
    normalize: Literal["l2", "none", "standardize"] = field(
        default="l2",
        metadata={
            "help": "How models shall normalise the rows, which are stored as the encoders give them: l2, none, or "
            "standardize with mean and standard deviation estimated from a sample of the rows."
        },
    )
    per_channel: bool = field(
        default=False,
        metadata={
            "help": "Standardise every channel by its own mean and standard deviation; by default a stream has one of "
            "each, as USAE's code."
        },
    )
    grid: list[int] | None = field(
        default=None, metadata={"help": "Rows and columns that patch tokens are resampled to (default: the model's)."}
    )
    batch_size: int = field(default=64, metadata={"help": "Samples that go through an encoder at once."})
    dtype: Literal["float32", "float16"] = field(default="float32", metadata={"help": "How the numbers are stored."})
    rows_per_shard: int = field(
        default=4096,
        metadata={"help": "Rows of one file, before any are left out; a killed run loses at most these."},
    )
    workers: int = field(default=2, metadata={"help": "Processes that read images; 0 reads in the main process."})
    device: str | None = field(
        default=None,
        metadata={"help": "Where the encoders run, such as cpu or cuda:0 (default: CUDA if there is one)."},
    )
    image_backend: Literal["pil", "torchvision"] = field(
        default="pil",
        metadata={"help": "What resizes images: pil (the same pixels on every machine) or torchvision (faster)."},
    )
    autocast: bool = field(default=False, metadata={"help": "Run the encoders in bfloat16 on a CUDA device."})
    trust_remote_code: bool = trust_remote_code_flag()
    limit: int | None = field(default=None, metadata={"help": "Rows to encode, from the first (default: all)."})
    on_error: Literal["stop", "skip", "keep"] = field(
        default="stop",
        metadata={
            "help": "What to do with an image that cannot be read, an empty text or a row that becomes NaN: stop with "
            "its name; skip it and list it in skipped.jsonl; or keep the sample without the streams that cannot be "
            "made and list it in incomplete.jsonl, for example where some images have no caption."
        },
    )
    repair: bool = field(
        default=False, metadata={"help": "Make the damaged shards of a finished dataset again; repeat its settings."}
    )


def run_extraction(args: ExtractionArguments) -> FeatureDataset:
    """Do what the arguments say: open the source, load the encoders, extract, and open the result.

    Raises:
        ValueError: for unusable arguments, and as `extract_features`.
    """
    check_sizes(args.batch_size, args.rows_per_shard, args.workers)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"`limit` must be at least 1 row, but it is {args.limit}")
    check_output_folder(args.output)
    if not (Path(args.output) / MANIFEST_NAME).is_file():  # a finished one is compared with the settings later
        check_target(Path(args.output))
    if args.device is not None:
        checked_device(args.device)
    if args.per_channel and args.normalize != "standardize":
        raise ValueError(f"`per_channel` needs `normalize` standardize with it, but that is {args.normalize!r}")
    records = parse_streams(args.encoders)
    for record in records:
        record["normalize"] = args.normalize
        if args.per_channel:
            record["per_channel"] = True
        if record["modality"] == "image":
            record["image_backend"] = args.image_backend
        if args.grid is not None and record.get("pooling") == "tokens":
            record["grid"] = args.grid
    source = _source(args)
    dataset = source.dataset
    if args.limit is not None:
        rows = getattr(dataset, "num_rows", None)
        dataset = dataset.take(args.limit if rows is None else min(args.limit, rows))
    processes = launched_processes()
    default = processes.device if processes else "cuda" if torch.cuda.is_available() else "cpu"
    modalities = {record["modality"] for record in records}
    columns: dict[str, Any] = {
        "image_column": args.image_column,
        "text_column": args.text_column or (source.text_column if "text" in modalities else None),
        "id_column": args.id_column,
        "labels_column": args.labels_column or source.labels_column,
        "keep_columns": args.keep_columns or (),
    }
    chosen_columns(dataset, modalities, **columns)  # a misspelt one is told before any model is loaded
    return extract_features(
        dataset,
        load_encoders(records, device=args.device or default, trust_remote_code=args.trust_remote_code),
        args.output,
        **columns,
        batch_size=args.batch_size,
        dtype=args.dtype,
        rows_per_shard=args.rows_per_shard,
        workers=args.workers,
        label_names=source.label_names,
        taxonomy=source.taxonomy,
        source={"dataset": args.source, "split": args.split, **source.facts},
        autocast=args.autocast,
        on_error=args.on_error,
        repair=args.repair,
    )


def _source(args: ExtractionArguments) -> Source:
    if args.source_format == "dataset":
        return Source(open_source(args.source, args.split, args.streaming))
    if args.streaming:
        raise ValueError(f"`streaming` is for `source_format` dataset, but it is {args.source_format}")
    if args.source_format == "coco":
        if args.images is None:
            raise ValueError("COCO needs the folder of its images; give it with `images`")
        return open_coco(args.source, args.images, instances=args.instances, rows=args.rows or "image")
    if args.source_format == "imagenet":
        return open_imagenet(args.source, args.split, class_names=args.class_names, hierarchy=args.hierarchy)
    if args.split is None:
        raise ValueError("Open Images needs `split`: train, validation or test")
    return open_open_images(
        args.source,
        args.split,
        rows=args.rows or "caption",
        captions=args.captions,
        images=args.images,
        label_files=args.label_files,
        class_descriptions=args.class_names,
        hierarchy=args.hierarchy,
    )


def run_extract(args: Any) -> dict[str, Any] | None:
    features = run_extraction(args)
    if launched_rank() > 0:  # of several processes one speaks
        return None
    printed = {"features": args.output, "rows": len(features), "rows_skipped": features.rows_skipped}
    if features.is_incomplete:
        printed["rows_without"] = features.rows_without
    return printed | {"streams": features.streams}
