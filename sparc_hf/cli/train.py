"""`sparc train`: train a model on a feature dataset."""

from pathlib import Path
from typing import Any


def run_train(args: Any) -> dict[str, Any] | None:
    from accelerate import PartialState

    from sparc_hf.hub.cards import write_model_card
    from sparc_hf.training.trainer import train

    def write_card(folder: Path) -> None:
        title = Path(args.output_dir).resolve().name
        write_model_card(folder, settings=args.to_dict(), title=title, repo=args.output_dir)

    model = train(args, complete=write_card)
    if not PartialState().is_main_process:
        return None
    return {"model": args.output_dir, "latents": model.config.num_latents, "streams": model.config.stream_names}
