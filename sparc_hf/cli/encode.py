"""`sparc encode`: turn a feature dataset into a code table."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class EncodeArguments:
    """Flags of `sparc encode`."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    features: str = field(metadata={"help": "Folder of the feature dataset."})
    output: str = field(metadata={"help": "Folder for the code table."})
    encoding: str = field(
        default="joint",
        metadata={
            "help": "joint: all streams of a sample choose latents together; single: each stream alone, the others "
            "imputed where the model can; single_ignoring: each stream alone, without that. Where a row lacks a "
            "stream, joint gives the code of its imputed row (see `sparc impute`), and the others an empty one.",
            "choices": ["joint", "single", "single_ignoring"],
        },
    )
    batch_size: int = field(default=1024, metadata={"help": "Rows at a time."})
    top_samples: int = field(
        default=0,
        metadata={
            "help": "Also write the rows that activate each latent most, this many per latent and stream, as "
            "top_samples.parquet in the output folder."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the output folder where it exists."})
    no_verify: bool = field(default=False, metadata={"help": "Do not compare features with their checksums."})


def run_encode(args: Any) -> dict[str, Any]:
    from sparc_hf.codes.code_table import CODE_FOLDER, CodeTable, encode_features
    from sparc_hf.codes.top_samples import TOP_SAMPLES_FILE, top_samples, write_top_samples
    from sparc_hf.features.dataset import FeatureDataset
    from sparc_hf.features.shards import check_target
    from sparc_hf.files.output_folder import check_output_folder
    from sparc_hf.model.modeling_sparc import SparcModel

    if args.top_samples < 0 or args.batch_size < 1:
        raise ValueError(
            f"`top_samples` must not be negative and `batch_size` at least 1, but they are {args.top_samples} and "
            f"{args.batch_size}"
        )
    check_output_folder(args.output)
    check_target(Path(args.output), args.overwrite, CODE_FOLDER)

    def write_top(codes: CodeTable, folder: Path) -> None:
        write_top_samples(top_samples(codes, args.top_samples), folder / TOP_SAMPLES_FILE)

    model = SparcModel.from_pretrained(args.model)
    features = FeatureDataset.load(args.features, verify=not args.no_verify)
    codes = encode_features(
        model,
        features,
        encoding=args.encoding,
        batch_size=args.batch_size,
        output=args.output,
        overwrite=args.overwrite,
        complete=write_top if args.top_samples else None,
    )
    printed = {"codes": args.output, "rows": len(codes), "streams": codes.streams, "encoding": codes.encoding}
    if lacking := {name: count for name, count in features.rows_without.items() if name in codes.streams}:
        printed["rows_without"] = lacking
    if args.top_samples:
        printed["top_samples"] = str(Path(args.output) / TOP_SAMPLES_FILE)
    return printed
