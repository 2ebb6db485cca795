"""What `sparc extract` asks for."""

from dataclasses import dataclass, field
from typing import Literal

from sparc_hf.command_arguments import trust_remote_code_flag


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
    on_error: Literal["stop", "skip"] = field(
        default="stop",
        metadata={
            "help": "What to do with an image that cannot be read, an empty text or a row that becomes NaN: stop with "
            "its name, or skip it and list it in skipped.jsonl."
        },
    )
    repair: bool = field(
        default=False, metadata={"help": "Make the damaged shards of a finished dataset again; repeat its settings."}
    )
