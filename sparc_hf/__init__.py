"""sparc_hf: one sparse concept space for many frozen vision and language encoders (SPARC, arXiv 2507.06265)."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_hf.lazy_names import lazy_names
from sparc_hf.version import __version__

if TYPE_CHECKING:
    from sparc_hf.codes.code_table import CodeTable, encode_features
    from sparc_hf.codes.concept_search import ConceptSearch
    from sparc_hf.codes.concepts import load_concepts, name_concepts, save_concepts
    from sparc_hf.codes.top_samples import TopSamples, top_samples
    from sparc_hf.encoders.stream_encoder import StreamEncoder, load_encoders
    from sparc_hf.evaluation.localization import localize
    from sparc_hf.evaluation.masked_images import open_masked_images
    from sparc_hf.evaluation.report import write_report
    from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model, evaluate_models
    from sparc_hf.features.batches import FeatureBatches, StreamedBatches
    from sparc_hf.features.dataset import FeatureDataset
    from sparc_hf.features.extraction import extract_features
    from sparc_hf.features.sources.source import open_source
    from sparc_hf.features.statistics import standardization_of
    from sparc_hf.features.stream_records import parse_streams
    from sparc_hf.features.writer import FeatureWriter
    from sparc_hf.hub.cards import write_dataset_card, write_model_card
    from sparc_hf.legacy.importing import import_features
    from sparc_hf.maps.contact_sheets import latent_sheet
    from sparc_hf.maps.explanation import explain_sample
    from sparc_hf.maps.maximisation import maximise_latent
    from sparc_hf.maps.patch_maps import image_maps
    from sparc_hf.maps.scored_words import word_scores
    from sparc_hf.maps.targets import ConceptTarget, SimilarityTarget
    from sparc_hf.model.configuration_sparc import SparcConfig
    from sparc_hf.model.modeling_sparc import SparcModel
    from sparc_hf.model.outputs import SparcOutput, SparseCodes
    from sparc_hf.pipeline import SparcPipeline
    from sparc_hf.training.arguments import SparcTrainingArguments
    from sparc_hf.training.imputation import add_imputation
    from sparc_hf.training.trainer import SparcTrainer, train

__all__ = [
    "CodeTable",
    "ConceptSearch",
    "ConceptTarget",
    "EvaluationSettings",
    "FeatureBatches",
    "FeatureDataset",
    "FeatureWriter",
    "SimilarityTarget",
    "SparcConfig",
    "SparcModel",
    "SparcOutput",
    "SparcPipeline",
    "SparcTrainer",
    "SparcTrainingArguments",
    "SparseCodes",
    "StreamEncoder",
    "StreamedBatches",
    "TopSamples",
    "__version__",
    "add_imputation",
    "encode_features",
    "evaluate_model",
    "evaluate_models",
    "explain_sample",
    "extract_features",
    "image_maps",
    "import_features",
    "latent_sheet",
    "load_concepts",
    "load_encoders",
    "localize",
    "maximise_latent",
    "name_concepts",
    "open_masked_images",
    "open_source",
    "parse_streams",
    "save_concepts",
    "standardization_of",
    "top_samples",
    "train",
    "word_scores",
    "write_dataset_card",
    "write_model_card",
    "write_report",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CodeTable": "codes.code_table",
        "ConceptSearch": "codes.concept_search",
        "ConceptTarget": "maps.targets",
        "EvaluationSettings": "evaluation.suite",
        "FeatureBatches": "features.batches",
        "FeatureDataset": "features.dataset",
        "FeatureWriter": "features.writer",
        "SimilarityTarget": "maps.targets",
        "SparcConfig": "model.configuration_sparc",
        "SparcModel": "model.modeling_sparc",
        "SparcOutput": "model.outputs",
        "SparcPipeline": "pipeline",
        "SparcTrainer": "training.trainer",
        "add_imputation": "training.imputation",
        "SparcTrainingArguments": "training.arguments",
        "SparseCodes": "model.outputs",
        "StreamEncoder": "encoders.stream_encoder",
        "StreamedBatches": "features.batches",
        "TopSamples": "codes.top_samples",
        "encode_features": "codes.code_table",
        "evaluate_model": "evaluation.suite",
        "evaluate_models": "evaluation.suite",
        "explain_sample": "maps.explanation",
        "extract_features": "features.extraction",
        "image_maps": "maps.patch_maps",
        "import_features": "legacy.importing",
        "latent_sheet": "maps.contact_sheets",
        "load_concepts": "codes.concepts",
        "load_encoders": "encoders.stream_encoder",
        "localize": "evaluation.localization",
        "maximise_latent": "maps.maximisation",
        "name_concepts": "codes.concepts",
        "open_masked_images": "evaluation.masked_images",
        "open_source": "features.sources.source",
        "parse_streams": "features.stream_records",
        "save_concepts": "codes.concepts",
        "standardization_of": "features.statistics",
        "top_samples": "codes.top_samples",
        "train": "training.trainer",
        "word_scores": "maps.scored_words",
        "write_dataset_card": "hub.cards",
        "write_model_card": "hub.cards",
        "write_report": "evaluation.report",
    },
)


def _register_auto_classes() -> None:
    """Make AutoConfig and AutoModel know this package's classes, importing the model's module at its first use."""
    from transformers import AutoConfig, AutoModel

    from sparc_hf.model.configuration_sparc import SparcConfig

    class ForwardToSparcModel(type):
        """Looks everything up on SparcModel; its module takes a second to import, which most scripts never need."""

        def __getattr__(cls, name: str) -> Any:
            return getattr(import_module("sparc_hf.model.modeling_sparc").SparcModel, name)

    stand_in = ForwardToSparcModel("SparcModel", (), {"config_class": SparcConfig})
    AutoConfig.register(SparcConfig.model_type, SparcConfig)
    AutoModel.register(SparcConfig, stand_in)  # pyright: ignore[reportArgumentType]


# The `sparc` command answers --help before torch could be imported; its commands import the model when they run.
if Path(sys.argv[0] if sys.argv else "").name not in ("sparc", "sparc.exe"):
    _register_auto_classes()
