"""What one training run is told, as a dataclass whose fields are the flags of `sparc train` and `train.py`."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from sparc_hf.model.configuration_sparc import IMPUTATION_DEFAULTS, SparcConfig

MODEL_FIELDS = (
    "num_latents",
    "k",
    "auxk",
    "auxk_coef",
    "cross_coef",
    "dead_after_steps",
    "dead_threshold",
    "selection",
    "objective",
    "distance",
)
# A resumed run repeats the uninterrupted one only if these are as they were.
TRAJECTORY_FIELDS = (
    *MODEL_FIELDS,
    "eval_fraction",
    "streams",
    "batch_size",
    "epochs",
    "learning_rate",
    "lr_schedule",
    "final_learning_rate",
    "warmup_steps",
    "schedule_after_update",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "rare_latent_push",
    "rare_latent_share",
    "alone_share",
    "alone_coef",
    "mixed_precision",
    "center",
    "reinitialize_every",
    "impute",
    "impute_shared",
    "impute_fit_steps",
    "seed",
)
CHOICES = {
    **{name: get_args(SparcConfig.__annotations__[name]) for name in ("objective", "distance", "selection")},
    "lr_schedule": ("constant", "cosine", "linear"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "step_kernel": ("auto", "on", "off"),
    "report_to": ("none", "tensorboard", "wandb", "trackio"),
}


def flag(help_text: str, default: Any, **metadata: Any) -> Any:
    """Declare a dataclass field together with the help its command-line flag shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text, **metadata})
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class SparcTrainingArguments:
    """Settings of a training run; the defaults are the SPARC paper's.

    Raises:
        ValueError: for an impossible value, naming the field.
    """

    features: str = field(metadata={"help": "Folder of the feature dataset to train on."})
    output_dir: str = field(metadata={"help": "Folder for the model, its log and its checkpoints."})
    eval_features: str | None = flag("Folder of a feature dataset to validate on after each epoch.", None)
    eval_fraction: float = flag("Share of the rows kept for validation where there is no --eval_features.", 0.0)
    streams: list[str] | None = field(
        default=None, metadata={"help": "Streams to train on (default: all in the dataset)."}
    )

    num_latents: int = flag("Latents in the shared code space (N).", SparcConfig.num_latents)
    k: int = flag("Active latents per code.", SparcConfig.k)
    auxk: int = flag("Dead latents decoded by the auxiliary term; 0 turns it off.", SparcConfig.auxk)
    auxk_coef: float = flag("Weight of the auxiliary term.", SparcConfig.auxk_coef)
    cross_coef: float = flag("Weight of the cross-reconstruction term.", SparcConfig.cross_coef)
    dead_after_steps: int = flag(
        "Steps without firing after which a latent counts as dead.", SparcConfig.dead_after_steps
    )
    dead_threshold: float = flag("Value above which a latent fires.", SparcConfig.dead_threshold)
    selection: str = flag(
        "Top-k selection: one for all streams (global) or one per stream (local).", SparcConfig.selection
    )

    objective: str = flag(
        "Training objective: sparc, or usae (Universal Sparse Autoencoders; needs --selection local).",
        SparcConfig.objective,
    )
    distance: str = flag("Distance of the usae objective: l1 or l2.", SparcConfig.distance)

    batch_size: int = flag("Rows per optimizer step, over all processes and micro-batches together.", 256)
    epochs: int = flag("Passes over the training rows.", 50)
    learning_rate: float = flag("Adam's learning rate (peak, where the schedule changes it).", 1e-4)
    lr_schedule: str = flag("Learning-rate schedule: constant, cosine or linear decay.", "constant")
    final_learning_rate: float = flag("Where the cosine schedule ends.", 0.0)
    adam_beta2: float = flag(
        "Decay of Adam's second moment; 0.95 keeps latents alive that few rows select (docs/training.md).", 0.999
    )
    weight_decay: float = flag("Weight decay of the usae objective's AdamW.", 0.0)
    warmup_steps: int = flag("Steps over which the learning rate rises from 0.", 0)
    schedule_after_update: bool = flag(
        "Set the cosine schedule's rate after each update, as the USAE code: the first update has the full rate, the "
        "warm-up rises from --final_learning_rate, and with --objective usae every stream goes through a schedule of "
        "its own, only when it is the source.",
        False,
    )
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip the gradient's norm to this (default: no clipping)."}
    )
    gradient_accumulation_steps: int = flag("Micro-batches a process splits its share of a step into.", 1)
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the encoder product: no (float32), bf16, or fp16 on a GPU (default: accelerate's)."
        },
    )
    max_preactivation_mb: float = flag(
        "Memory for pre-activations in MiB; larger shares go in blocks of rows.", 1024.0
    )
    step_kernel: str = flag(
        "Compiled step: auto (on a CPU, built for long runs, 15 s once), on (on a GPU Triton's kernels, which "
        "none has run so far), or off.",
        "auto",
    )
    center: bool = flag(
        "Start the pre-biases at the mean of the training rows instead of 0 as the paper's code.", False
    )
    rare_latent_push: float = flag(
        "Raise the biases of rarely selected latents by this share of what it takes to be selected, every step "
        "(sparc objective only; 0 turns it off, 0.003 is enough).",
        0.0,
    )
    rare_latent_share: float = flag("A latent is rare below this share of the mean selection rate k / N.", 0.1)
    alone_share: float = flag(
        "Share of each step's rows that are encoded once more from one stream alone, drawn at random, with the others "
        "imputed; its code is to reconstruct all streams (sparc objective with global selection; 0 turns it off).",
        0.0,
    )
    alone_coef: float = flag(
        "Weight of the term of streams alone, which is in the training loss and not in that of validation.", 1.0
    )
    reinitialize_every: int = flag("Steps between re-initialisations of dead latents; 0 turns them off.", 100)
    impute: bool = flag(
        "Measure mean and covariance of the streams, by which the model encodes rows that lack some of them "
        "(objective sparc): at the end, or before the first step where training needs them.",
        True,
    )
    impute_shared: float = flag(
        "How far the selection moves a stream that is given towards what others know of it, where others are missing, "
        "from 0 to 1 (docs/alignment.md).",
        IMPUTATION_DEFAULTS["shared"],
    )
    impute_fit_steps: float = flag(
        "Steps by which values are then fitted to the rows of all streams; of a broken number the last goes only that "
        "part of its way.",
        IMPUTATION_DEFAULTS["fit_steps"],
    )
    seed: int = flag("Seed of the initial weights, the row order and the re-initialisations.", 0)

    checkpoint_every: int = flag("Steps between checkpoints; 0 saves one only when the run is stopped.", 1000)
    checkpoints_kept: int = flag("Newest checkpoints to keep.", 2)
    resume: bool = flag("Continue from the newest checkpoint in the output folder.", False)
    overwrite: bool = flag("Replace a finished run in the output folder.", False)
    logging_every: int = flag("Steps between entries of the log, the trackers and the progress bar.", 50)
    no_verify: bool = flag("Do not compare features and checkpoints with their checksums.", False)
    report_to: str = flag("Tracker: none, tensorboard, wandb or trackio (the JSON-lines log is always kept).", "none")
    cpu: bool = flag("Train on the CPU even where there is a GPU.", False)

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed and (name, getattr(self, name)) != ("mixed_precision", None):
                raise ValueError(f"`{name}` must be one of {list(allowed)}, but it is {getattr(self, name)!r}")
        for name in ("batch_size", "epochs", "gradient_accumulation_steps", "logging_every", "checkpoints_kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but it is {getattr(self, name)}")
        for name in ("warmup_steps", "checkpoint_every", "reinitialize_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, but it is {getattr(self, name)}")
        if not 0 <= self.final_learning_rate <= self.learning_rate or self.weight_decay < 0:
            raise ValueError(
                "`final_learning_rate` must be from 0 to `learning_rate`, `weight_decay` not negative, but they are "
                f"{self.final_learning_rate} and {self.weight_decay}"
            )
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"`adam_beta2` must be at least 0 and below 1, but it is {self.adam_beta2}")
        if self.rare_latent_push < 0 or not 0 < self.rare_latent_share <= 1:
            raise ValueError(
                "`rare_latent_push` must not be negative and `rare_latent_share` be above 0 and at most 1, but they "
                f"are {self.rare_latent_push} and {self.rare_latent_share}"
            )
        if not 0 <= self.alone_share <= 1 or self.alone_coef < 0:
            raise ValueError(
                "`alone_share` must be from 0 to 1 and `alone_coef` not negative, but they are "
                f"{self.alone_share} and {self.alone_coef}"
            )
        if not 0 <= self.impute_shared <= 1 or not 0 <= self.impute_fit_steps <= 100:
            raise ValueError(
                "`impute_shared` must be from 0 to 1 and `impute_fit_steps` from 0 to 100, but they are "
                f"{self.impute_shared} and {self.impute_fit_steps}"
            )
        if self.alone_share and self.selection == "local":
            raise ValueError("`alone_share` is of streams that select together; leave it off with `selection` local")
        if self.schedule_after_update and self.lr_schedule != "cosine":
            raise ValueError(
                f"`schedule_after_update` needs `lr_schedule` cosine with it, but that is {self.lr_schedule!r}"
            )
        SparcConfig.from_dict(self.model_settings())  # refuses what a model cannot be
        if self.objective == "usae" and self.center:
            raise ValueError("`center` sets pre-biases, which `objective` usae has not; leave it off")
        if self.objective == "usae" and self.rare_latent_push:
            raise ValueError(
                "`rare_latent_push` raises biases, which have no effect before the batch norm of `objective` usae; "
                "leave it off"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be positive, but it is {self.learning_rate}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must be at least 0 and below 1, but it is {self.eval_fraction}")
        if self.eval_fraction and self.eval_features:
            raise ValueError("`eval_fraction` and `eval_features` both choose validation rows; give only one of them")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return asdict(self)

    def scalars(self) -> dict[str, int | float | str]:
        """Return the settings as trackers take them, which is scalars and text only."""
        settings = vars(self).items()
        return {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings}

    def model_settings(self) -> dict[str, Any]:
        """Return the fields that SparcConfig has too."""
        return {name: getattr(self, name) for name in MODEL_FIELDS}

    def imputation_settings(self) -> dict[str, float]:
        """Return what `SparcConfig.imputation` is to say."""
        return {"shared": self.impute_shared, "fit_steps": self.impute_fit_steps}

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Return "field: saved -> now" for each setting that would change the course of a resumed run."""
        # A run from before a setting was there had its default.
        before = {f.name: f.default for f in fields(self)} | saved
        return [
            f"`{name}`: {before[name]!r} -> {getattr(self, name)!r}"
            for name in TRAJECTORY_FIELDS
            if before[name] != getattr(self, name)
        ]
