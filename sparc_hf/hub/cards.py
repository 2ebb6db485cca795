"""Cards: what a model or a feature dataset says about itself on the Hub."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from sparc_hf.evaluation.results import (
    MEASURED_ENCODINGS,
    check_results,
    eval_results,
    figure_text,
    number_text,
    results_of_model,
    template,
)
from sparc_hf.files.atomic_files import new_file, write_json, write_text, writing
from sparc_hf.files.checked_reading import read_json
from sparc_hf.model.configuration_sparc import SparcConfig
from sparc_hf.model_folder import CARD_FILE, ORIGIN_FILE, OTHER_CARD_FILE, PICTURE_FILE, RESULTS_FILE, is_model_card
from sparc_hf.version import __version__

if TYPE_CHECKING:
    from sparc_hf.features.dataset import FeatureDataset

logger = logging.getLogger(__name__)

UNKNOWN_ENCODER = dict.fromkeys(("encoder", "revision", "modality", "pooling"))
# Facts of the run that say nothing about the model.
UNTOLD_SETTINGS = {
    *("features", "eval_features", "eval_fraction", "output_dir", "resume", "overwrite", "report_to", "cpu"),
    *("streams", "no_verify", "checkpoint_every", "checkpoints_kept", "logging_every", "max_preactivation_mb"),
}


def write_model_card(
    folder: str | Path,
    *,
    results: Mapping[str, Any] | None = None,
    results_split: str = "held-out",
    settings: Mapping[str, Any] | None = None,
    repo: str | None = None,
    title: str | None = None,
) -> Path:
    """Write the model card README.md of a saved model, from its config and what is known of it.

    A README.md that is no such card stays, and the card becomes `model_card.md` beside it.

    Args:
        folder: a folder written by `SparcModel.save_pretrained`.
        results: the `results` of what `evaluate_model` returned; they also become the card's model-index, and stay in
            the folder (results.json) for the next card, which shows them unless it is given others.
        results_split: a word for the rows behind the results.
        settings: the training arguments.
        repo: the name under which readers load the model (default: the folder).
        title: the card's heading (default: the last part of that name).

    Returns:
        The card's path.

    Raises:
        ValueError: where the folder holds no SparcModel, or the results are of another model.
    """
    from huggingface_hub import ModelCardData

    folder = Path(folder)
    config = config_of(folder)
    name = repo.rsplit("/", 1)[-1] if repo else folder.resolve().name
    title = title or name
    results = _shown_results(folder, config, results, name)
    streams: list[dict[str, Any]] = [UNKNOWN_ENCODER | record for record in config.streams or []]
    encoders = sorted({record["encoder"] for record in streams if _is_hub_id(record["encoder"])})
    card_data = ModelCardData(
        library_name="sparc-hf",
        license="apache-2.0",
        tags=["sparse-autoencoder", "interpretability", config.objective, *config.stream_names],
        base_model=encoders or None,
        pipeline_tag="feature-extraction",
        model_name=title,
        eval_results=eval_results(results) if results else None,
    )
    example = ", ".join(f'"{record["name"]}": {record["name"]}_rows' for record in streams)
    if results:
        _write_picture(folder / PICTURE_FILE, results)
    runnable = all(record["encoder"] and record["modality"] for record in streams)
    text = _card_template("model_card.md").render(
        card_data=card_data.to_yaml(),
        title=title,
        repo=repo or str(folder),
        config=config,
        streams=streams,
        example="{" + example + "}",
        modalities=sorted({record["modality"] for record in streams}) if runnable else [],
        concepts=example_concepts(folder),
        picture=PICTURE_FILE if results else None,
        results=results,
        results_split=results_split,
        settings={name: value for name, value in (settings or {}).items() if name not in UNTOLD_SETTINGS},
        origin=_origin_of(folder),
        version=__version__,
    )
    path = folder / CARD_FILE
    if path.exists() and not is_model_card(path):
        logger.warning("`%s` is not a card that was written here, so the card is in %s", path, OTHER_CARD_FILE)
        path = folder / OTHER_CARD_FILE
    with writing(f"`{path}`", "make room and run the same again"):
        write_text(path, text.rstrip() + "\n")
    return path


def _shown_results(
    folder: Path, config: SparcConfig, results: Mapping[str, Any] | None, name: str
) -> Mapping[str, Any] | None:
    """Keep results in the folder under a name, or return those it has; new weights remove them."""
    path = folder / RESULTS_FILE
    shown = results_of_model(path, folder) if results is None and path.exists() else results
    if shown is not None:
        check_results(shown, config, folder)
    if results is not None:
        write_json(path, {"models": {name: results}})
    return shown


def _write_picture(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the reconstruction matrices of both encodings."""
    from sparc_hf.evaluation.plots import reconstruction_matrix

    panels = {f"{encoding} encoding": results[encoding]["reconstruction"]["nmse"] for encoding in MEASURED_ENCODINGS}
    figure = reconstruction_matrix(panels, "normalised squared error")
    with new_file(path) as file:
        figure.savefig(file, dpi=110, format="png", bbox_inches="tight")


def example_concepts(folder: Path, count: int = 8) -> list[Any]:
    """Return the surest named concepts of a model that fire in every stream, at most one of a name."""
    from sparc_hf.codes.concepts import load_concepts, surest_concepts

    everywhere = [concept for concept in load_concepts(folder) if concept.fires and min(concept.fires.values()) > 0]
    return surest_concepts(everywhere, count)


def write_dataset_card(
    folder: Path, splits: Mapping[str, "FeatureDataset"], *, repo: str | None = None, license: str | None = None
) -> Path:
    """Write the card README.md of a folder of pushed features.

    Args:
        folder: the folder.
        splits: split -> its dataset, all with the same streams.
        repo: the Hub id readers will load it from (default: the folder).
        license: an identifier the Hub knows; without it the card says that it is to be filled in.
    """
    from huggingface_hub import DatasetCardData

    first = next(iter(splits.values()))
    repo = repo or str(folder)
    rows = sum(map(len, splits.values()))
    data = DatasetCardData(
        license=license or "other",
        tags=["features", "sparse-autoencoder", "sparc", *first.stream_names],
        size_categories=[_size_category(rows)],
        pretty_name=repo.rsplit("/", 1)[-1],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
    )
    text = _card_template("dataset_card.md").render(
        card_data=data.to_yaml(),
        title=data.pretty_name,
        repo=repo,
        home=HOME,
        streams=[UNKNOWN_ENCODER | {"normalize": "none"} | record for record in first.streams],
        splits={split: len(features) for split, features in splits.items()},
        incomplete={
            split: ", ".join(f"`{name}` {count:,}" for name, count in features.rows_without.items())
            for split, features in splits.items()
            if features.is_incomplete
        },
        label_names=first.label_names,
        source=_source_text(first.source),
        license=license,
        version=__version__,
    )
    path = folder / "README.md"
    write_text(path, text.rstrip() + "\n")
    return path


HOME = "https://pypi.org/project/sparc-hf/"
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def _size_category(rows: int) -> str:
    """Return the Hub's word for a number of rows."""
    return SIZES[min(len(SIZES) - 1, max(0, len(str(rows)) - 3))]


def _source_text(source: Any) -> str | None:
    """Return where samples came from, without folders of the machine that read them."""
    if not isinstance(source, Mapping):
        return None if source is None or os.path.exists(str(source)) else str(source)
    facts = {key: value for key, value in source.items() if value is not None and not os.path.exists(str(value))}
    return ", ".join(f"{key} `{value}`" for key, value in facts.items()) or None


def config_of(folder: Path) -> SparcConfig:
    """Return the config of a saved model; ValueError where the folder holds none."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no model (no config.json); save one there with `save_pretrained` first")
    content = read_json(folder / "config.json", dict[str, Any])
    if content.get("model_type") != SparcConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {content.get('model_type')!r}, not a SparcModel")
    return SparcConfig.from_dict(content)


class _Origin(TypedDict):
    """Where an imported model came from."""

    project: str
    checkpoint: str
    sha256: str
    run: Any
    data: Any


def _origin_of(folder: Path) -> dict[str, Any] | None:
    """Return where an imported model came from, or None for one that was trained here."""
    file = folder / ORIGIN_FILE
    return read_json(file, _Origin) if file.is_file() else None


def _is_hub_id(encoder: Any) -> bool:
    return isinstance(encoder, str) and encoder.count("/") == 1 and not encoder.startswith((".", "/", "~"))


def _card_template(name: str) -> Any:
    return template(
        name, code=lambda text: f"`{text}`", figure=figure_text, error_row=_error_row, encoder_link=_encoder_link
    )


def _error_row(nmse: Mapping[str, Mapping[str, float | None]], target: str) -> list[str]:
    """Return the error of one target from every source, as text."""
    return [number_text(value) for value in nmse[target].values()]


def _encoder_link(record: Mapping[str, Any]) -> str:
    encoder, revision = record.get("encoder"), record.get("revision")
    if encoder is None:
        return "not recorded"
    at = f" @ `{revision[:12]}`" if revision else ""
    if _is_hub_id(encoder):
        return f"[{encoder}](https://huggingface.co/{encoder}){at}"
    return f"`{Path(encoder).name}`{at}"
