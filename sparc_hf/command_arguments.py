"""Flags of the short commands, as dataclasses; extraction and training keep theirs beside their code."""

from dataclasses import dataclass, field
from typing import Any


def trust_remote_code_flag() -> Any:
    """Declare the flag of the commands that load encoders."""
    text = "Run code from the encoders' repositories, where they need it; look at that code first."
    return field(default=False, metadata={"help": text})


@dataclass
class EncodeArguments:
    """Flags of `sparc encode`."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    features: str = field(metadata={"help": "Folder of the feature dataset."})
    output: str = field(metadata={"help": "Folder for the code table."})
    encoding: str = field(
        default="joint",
        metadata={
            "help": "joint: all streams of a sample choose latents together; single: each stream alone.",
            "choices": ["joint", "single"],
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


@dataclass
class EvaluateArguments:
    """Flags of `sparc evaluate`."""

    models: list[str] = field(
        metadata={"help": "Folders or Hub ids of the models; `sparc evaluate A B C` names them without the flag."}
    )
    features: str = field(metadata={"help": "Folder of the feature dataset, rows the models were not trained on."})
    output: str | None = field(
        default=None,
        metadata={"help": "Folder for results.json, report.html, model-index.yaml and a CSV of latents per model."},
    )
    batch_size: int = field(default=1024, metadata={"help": "Rows at a time."})
    replicates: int = field(
        default=200,
        metadata={
            "help": "How often figures made from counts are measured again for their 95 %% intervals, each time "
            "without another part of the rows; 0 leaves all intervals out."
        },
    )
    retrieval_rows: int | None = field(
        default=None, metadata={"help": "Samples to measure retrieval on, spread evenly (default: all)."}
    )
    no_probes: bool = field(
        default=False,
        metadata={"help": "Leave out the slowest parts: probes, classifiers and the matching of atoms."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of these parts and of the probes' splits."})
    masks: str | None = field(
        default=None,
        metadata={
            "help": "Also measure how well maps find classes, against these masks: a COCO instances JSON, a saved "
            "Dataset with `image`, `masks` and `mask_labels`, or demo:test."
        },
    )
    mask_images: str | None = field(default=None, metadata={"help": "Folder of the JSON's images."})
    mask_rows: int | None = field(
        default=None, metadata={"help": "Most images with masks to use (default: all, or 500 scenes)."}
    )
    concept_features: str | None = field(
        default=None,
        metadata={
            "help": "Feature dataset with labels, other rows than the masks', to choose each class's latent on."
        },
    )
    map_methods: list[str] = field(
        default_factory=lambda: ["relevance"], metadata={"help": "Kinds of maps: relevance, grad_cam, patch_codes."}
    )
    shifts: int = field(
        default=2,
        metadata={"help": "Maps of the image shifted this many times along each axis are averaged; 1 for plain maps."},
    )
    prompt: str = field(default="a photo of a {}", metadata={"help": "Text for a class, which stands in place of {}."})
    no_verify: bool = field(default=False, metadata={"help": "Do not compare features with their checksums."})
    trust_remote_code: bool = trust_remote_code_flag()


@dataclass
class ConceptsArguments:
    """Flags of `sparc concepts`."""

    model: str = field(metadata={"help": "Folder of the model; gets concepts.json."})
    features: str | None = field(
        default=None,
        metadata={
            "help": "Feature dataset with labels, captions, or both, to name latents by and to take top samples from; "
            "without it, nothing is named anew."
        },
    )
    samples: int = field(default=20, metadata={"help": "Top samples of a latent in a stream that names come from."})
    vocabulary: str | None = field(
        default=None,
        metadata={"help": "Text file with a word a line: latents are also named by the words that raise them."},
    )
    prompt: str = field(default="{}", metadata={"help": "Text for a word of the vocabulary, which replaces {}."})
    output: str | None = field(default=None, metadata={"help": "Folder for pictures; those it has are kept."})
    latents: list[int] = field(
        default_factory=list, metadata={"help": "Draw contact sheets of these latents: top samples with maps."}
    )
    concept: list[str] = field(
        default_factory=list, metadata={"help": "Draw contact sheets of these concepts, found as by `sparc explain`."}
    )
    top: int = field(
        default=0, metadata={"help": "Draw contact sheets of this many latents, the most surely named, one a name."}
    )
    heatmaps: int = field(
        default=0,
        metadata={"help": "Draw maps of this many latents, by energy, over the same images in one figure."},
    )
    heatmap_images: int = field(default=8, metadata={"help": "Images in that figure, the first of the dataset."})
    images: list[str] = field(
        default_factory=list, metadata={"help": "Image files for that figure, in place of the dataset's."}
    )
    maximise: list[int] = field(
        default_factory=list, metadata={"help": "Make an image per stream that fires each of these latents."}
    )
    method: str = field(
        default="relevance",
        metadata={"help": "Kind of maps.", "choices": ["relevance", "grad_cam", "patch_codes"]},
    )
    shifts: int = field(default=2, metadata={"help": "As of `sparc evaluate`: 1 for plain maps."})
    steps: int = field(default=256, metadata={"help": "Steps of maximisation."})
    seed: int = field(default=0, metadata={"help": "Seed of maximisation."})
    batch_size: int = field(default=1024, metadata={"help": "Rows at a time."})
    no_verify: bool = field(default=False, metadata={"help": "Do not compare features with their checksums."})
    trust_remote_code: bool = trust_remote_code_flag()


@dataclass
class CardArguments:
    """Flags of `sparc card`."""

    model: str = field(metadata={"help": "Folder of the model; its README.md is replaced."})
    results: str | None = field(default=None, metadata={"help": "results.json written by `sparc evaluate --output`."})
    repo: str | None = field(default=None, metadata={"help": "Hub id readers will load it from."})


@dataclass
class DemoArguments:
    """Flags of `sparc demo`."""

    output: str = field(default="runs/demo", metadata={"help": "Folder for features, model and results."})
    train_rows: int = field(default=8000, metadata={"help": "Scenes to train on."})
    test_rows: int = field(default=1000, metadata={"help": "Held-out scenes to evaluate on."})
    num_latents: int = field(default=256, metadata={"help": "Latents in the shared code space (N)."})
    k: int = field(default=16, metadata={"help": "Active latents per code."})
    epochs: int = field(default=30, metadata={"help": "Passes over the training scenes."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes, the weights and the row order."})


@dataclass
class SpaceArguments:
    """Flags of `sparc space`; those left out are taken from the environment variables of the Space."""

    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the model (default: SPARC_MODEL, or the demo, prepared once)."},
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "Feature dataset the model is shown on, with images, texts and labels: folder or Hub id "
            "(default: SPARC_DATASET, or the demo's held-out scenes)."
        },
    )
    cache: str | None = field(
        default=None,
        metadata={"help": "Folder for what is computed once (default: SPARC_CACHE, or ~/.cache/sparc_hf)."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 lets other machines in."})
    port: int | None = field(default=None, metadata={"help": "Port (default: the first free one from 7860)."})
