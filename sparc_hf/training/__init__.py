"""The training loop, its settings, optimizers and checkpoints."""

from sparc_hf.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SparcTrainer": "trainer",
        "SparcTrainingArguments": "arguments",
        "add_imputation": "imputation",
        "train": "trainer",
    },
)
