"""`sparc impute`: give an existing model the statistics by which it encodes rows that lack some of its streams."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ImputeArguments:
    """Flags of `sparc impute`."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    features: str = field(
        metadata={
            "help": "Folder of the feature dataset it was trained on; it is read once, twice where rows lack streams."
        }
    )
    output: str = field(metadata={"help": "Folder for the model that has them; it may be that of the model itself."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is in the output folder."})
    ridge: float | None = field(
        default=None, metadata={"help": "Ridge of the guess, in mean variances (docs/alignment.md says of all four)."}
    )
    shared: float | None = field(
        default=None, metadata={"help": "How far the selection moves given rows towards what others know, 0 to 1."}
    )
    own_weight: float | None = field(
        default=None, metadata={"help": "Weight of a code's own stream where its values are fitted."}
    )
    fit_steps: float | None = field(default=None, metadata={"help": "Steps by which values are fitted; 0 for none."})
    no_verify: bool = field(default=False, metadata={"help": "Do not compare features with their checksums."})


def run_impute(args: Any) -> dict[str, Any]:
    from sparc_hf.features.dataset import FeatureDataset
    from sparc_hf.files.output_folder import check_output_folder
    from sparc_hf.hub.cards import write_model_card
    from sparc_hf.model.configuration_sparc import IMPUTATION_DEFAULTS
    from sparc_hf.model.modeling_sparc import SparcModel
    from sparc_hf.model_folder import KEPT_WITH_SAME_CODES, holds_model, read_settings, save_model
    from sparc_hf.training.imputation import add_imputation

    check_output_folder(args.output)
    source, output = Path(args.model), Path(args.output)
    if holds_model(output) and not args.overwrite:
        raise ValueError(f"{output} already holds a model; replace it with --overwrite, or choose another --output")
    model = SparcModel.from_pretrained(args.model).eval()
    given = {name: getattr(args, name) for name in IMPUTATION_DEFAULTS}
    # Statistics that are made again are used as the former ones were; their ridge is that of the rows they are of.
    former = {name: value for name, value in (model.config.imputation or {}).items() if name != "ridge"}
    settings = former | {name: value for name, value in given.items() if value is not None}
    imputation = add_imputation(model, FeatureDataset.load(args.features, verify=not args.no_verify), **settings)

    def complete(folder: Path) -> None:
        for name in KEPT_WITH_SAME_CODES:
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
        write_model_card(folder, settings=read_settings(folder), title=output.resolve().name, repo=args.output)

    save_model(model, output, complete)
    return {"model": args.output, "streams": model.config.stream_names, "imputation": imputation.settings}
