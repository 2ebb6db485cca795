"""Train a SparcModel on a feature dataset: the Accelerate loop, its checkpoints, its log and its trackers."""

import contextlib
import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import Tensor

from sparc_hf.features.batches import FeatureBatches
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.files.atomic_files import write_json, writing
from sparc_hf.files.folder_lock import launched_rank, locked_folder
from sparc_hf.files.output_folder import check_output_folder
from sparc_hf.model.configuration_sparc import SparcConfig
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.model_folder import LOG_FILE, SETTINGS_FILE, claimed_run, cut_log, read_settings
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.checkpoints import Checkpoints
from sparc_hf.training.given_streams import AloneDraws, GivenStreams
from sparc_hf.training.gradient_exchange import exchanged_bytes, gather_terms, sum_gradients
from sparc_hf.training.imputation import add_offsets, add_statistics
from sparc_hf.training.learning_rate import ScheduleAfterUpdate, schedule_of
from sparc_hf.training.loss_sums import LossSums
from sparc_hf.training.optimizer import UsaeAdamW, add_up_terms, optimizer_of
from sparc_hf.training.random_numbers import seeded
from sparc_hf.training.rare_latents import RareLatentPush
from sparc_hf.training.rows import center_pre_biases, random_split, records_of, rows_with_any
from sparc_hf.training.run_accelerator import accelerator_of
from sparc_hf.training.step_kernel import built_library, load_gpu_kernels, load_step_kernel
from sparc_hf.training.stop_signals import StopSignals, TrainingInterrupted
from sparc_hf.version import __version__

# Tells the draws of source streams apart from other draws of the same seed.
SOURCE_DRAWS = 0x5053
# Parameters times steps of a run of about a minute, beyond which building the compiled step pays.
WORTH_BUILDING = 2e10

logger = logging.getLogger(__name__)


def train(args: SparcTrainingArguments, complete: Callable[[Path], Any] | None = None) -> SparcModel:
    """Train on the feature dataset `args.features` and save the model in `args.output_dir`.

    Args:
        args: the settings.
        complete: adds to the model's folder what else belongs to it, such as its card; called before the model
            appears.

    Returns:
        The trained model, in eval mode on its device.

    Raises:
        ValueError: for settings, features or an output folder that cannot be used, or that another process uses.
        OSError: saying what to do, where something cannot be written; the last checkpoint is kept.
        FloatingPointError: when the loss becomes NaN or infinite; names the step, the terms and the checkpoint to
            go back to. Nothing saved before is touched.
        TrainingInterrupted: after SIGTERM or Ctrl-C, once a checkpoint is saved.
    """
    SparcConfig(**args.model_settings())  # settings that contradict each other are told before any row is read
    check_output_folder(args.output_dir, "output_dir")
    _check_tracker(args.report_to)
    verify = not args.no_verify
    with locked_folder(args.output_dir, rank=launched_rank()):
        held_out = FeatureDataset.load(args.eval_features, verify) if args.eval_features else None
        features = FeatureDataset.load(args.features, verify)
        if args.eval_fraction:
            features, held_out = random_split(features, args.eval_fraction, args.seed)
        return SparcTrainer(args, features, held_out).train(complete)


def _check_tracker(name: str) -> None:
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ImportError(f'`report_to` {name} is not installed: `pip install "sparc-hf[trackers]"`')


class SparcTrainer:
    """The training loop.

    The result does not depend on how the work is split: `args.batch_size` rows make one optimizer step however many
    processes and micro-batches share them, and the dead counters agree on all processes.

    Args:
        args: the settings; `args.features` is not read here.
        features: training rows.
        held_out: validation rows, or None.
    """

    def __init__(self, args: SparcTrainingArguments, features: FeatureDataset, held_out: FeatureDataset | None = None):
        self.args, self.streams = args, args.streams or features.stream_names
        records = records_of(features, self.streams)
        features = rows_with_any(features, self.streams)
        held_out = None if held_out is None else rows_with_any(held_out, self.streams)
        self.rows = len(features)
        self.run = claimed_run(args.output_dir, resume=args.resume, overwrite=args.overwrite)
        if self.run.is_finished and args.overwrite and self._changes(read_settings(self.run.folder)):
            self.run = claimed_run(args.output_dir, resume=False, overwrite=True)
        _check_tracker(args.report_to)
        self.accelerator = accelerator_of(args, self.run.folder)
        self.checkpoints = Checkpoints(self.run.folder, self.accelerator, args.checkpoints_kept)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        features.check_rows(streams=self.streams)
        if held_out is not None:
            held_out.check_rows(streams=self.streams)
        self.batches = self._batches(features, shuffle=True)
        self.eval_batches = self._batches(held_out, shuffle=False) if held_out is not None else None
        self.config = SparcConfig(streams=records, **args.model_settings())
        with seeded(args.seed):
            self.model = SparcModel(self.config)
        self.model.counter_group = torch.distributed.group.WORLD if self.world_size > 1 else None
        if args.center:
            center_pre_biases(self.model, features)
        self.model.max_preactivation_mb = args.max_preactivation_mb
        # In "evaluation mode" Accelerate moves the model and sets its precision, but leaves the gradients to us.
        self.accelerator.prepare_model(self.model, evaluation_mode=True)
        # One stream has no others to be imputed.
        alone_share = args.alone_share if len(self.streams) > 1 else 0.0
        alone = AloneDraws(self.streams, alone_share, args.alone_coef, args.seed)
        self._given = GivenStreams(features, self.streams, alone)
        self._given_in_eval = self._given if held_out is None else GivenStreams(held_out, self.streams)
        if self._given.any_missing or self._given_in_eval.any_missing or alone_share:
            self._given.check(self.model, args.impute)
            self._add_statistics(features)
        self.is_usae = args.objective == "usae"
        self._adam = optimizer_of(args, self.model)
        self._push = RareLatentPush(self._adam, self.model, args.rare_latent_push, args.rare_latent_share)
        self.optimizer = self.accelerator.prepare_optimizer(self._adam)
        self.total_steps = len(self.batches) * args.epochs
        if not self.is_usae and self._takes_terms():
            self.model.gradient_terms = {}
        # Stepped once per optimizer step by hand: a prepared scheduler advances once per process.
        self.scheduler = schedule_of(args, self._adam, self.total_steps)
        self.step = 0
        self._sums = LossSums(self.accelerator.device)
        self._stop_signal = self._rows_since = 0
        self._signals = StopSignals()

    def _takes_terms(self) -> bool:
        """Return whether gradients stay factored: to send less, on a CPU, or for the kernels that are loaded here."""
        takes_terms = self.accelerator.device.type == "cpu"
        if takes_terms and self.args.step_kernel != "off":
            work = self.total_steps * self.model.num_parameters()
            if self.args.step_kernel == "on" or work >= WORTH_BUILDING or built_library().is_file():
                with self.accelerator.local_main_process_first():
                    load_step_kernel()
        elif self.accelerator.device.type == "cuda" and self.args.step_kernel == "on":
            takes_terms = load_gpu_kernels(self.accelerator.device)
        if self.world_size > 1:
            as_terms, dense = exchanged_bytes(self.config, self.batches.batch_size, self._given.gives_alone)
            return as_terms < dense
        return takes_terms and not self._needs_dense_gradients

    @property
    def _needs_dense_gradients(self) -> bool:
        return self.args.max_grad_norm is not None or self.accelerator.scaler is not None

    def _batches(self, features: FeatureDataset, shuffle: bool) -> FeatureBatches:
        return FeatureBatches(
            features,
            batch_size=min(self.args.batch_size, len(features)),
            streams=self.streams,
            shuffle=shuffle,
            seed=self.args.seed,
            rank=self.rank,
            world_size=self.world_size,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def train(self, complete: Callable[[Path], Any] | None = None) -> SparcModel:
        """Run from the start, or from the newest checkpoint with `args.resume`, to the end; see `train`."""
        with locked_folder(self.run.output, rank=self.rank), seeded(self.args.seed):
            if self.run.is_finished:
                return self._finished_model()
            self._train(complete)
        return self.model.eval()

    def _train(self, complete: Callable[[Path], Any] | None) -> None:
        self.accelerator.wait_for_everyone()  # nothing changes before all have looked
        if self.accelerator.is_main_process:
            self._begin()
        self.accelerator.wait_for_everyone()
        if self.args.resume:
            self._resume()
        if self.accelerator.is_main_process:
            cut_log(self.run.folder / LOG_FILE, self.step)
        self.accelerator.init_trackers("sparc", config=self.args.scalars())
        with self._signals, self._progress_bar() as self._bar:
            self._clock, self._rows_since = time.perf_counter(), 0
            first_epoch = self.step // max(len(self.batches), 1)
            if self.step and self.step % len(self.batches) == 0:  # the run stopped before it could do this
                self._report(self._evaluate(), first_epoch - 1)
            for epoch in range(first_epoch, self.args.epochs):
                self.batches.set_epoch(epoch)
                self.batches.load_state_dict({"epoch": epoch, "batch": self.step - epoch * len(self.batches)})
                for share in self.batches:
                    self._train_step(share, self.batches.global_batch_rows(self.step - epoch * len(self.batches)))
                    self._after_step(epoch)
                self._report(self._evaluate(), epoch)
        if self.args.impute and self.model.objective.selects_together and len(self.streams) > 1 and self.rows > 1:
            features = cast(FeatureDataset, self.batches.features)
            if self.model.imputation is None:
                self._add_statistics(features)
            add_offsets(self.model.eval(), features)
        self._save_model(complete)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()  # after which processes cannot wait for each other

    def _begin(self) -> None:
        """Make the run's folder ready, unless another process was there since this one looked."""
        args = self.args
        if self.run != claimed_run(args.output_dir, resume=self.run.is_resumed, overwrite=args.overwrite):
            raise ValueError(f"another process has worked in {args.output_dir} since this one started; start again")
        with writing(f"`{self.run.folder}`", "make room and start again"):
            self.run.begin()
            write_json(self.run.folder / SETTINGS_FILE, self._settings())

    def _finished_model(self) -> SparcModel:
        """Return the model of a run that was finished before this one started, which leaves nothing to do."""
        if changed := self._changes(read_settings(self.run.folder)):
            raise ValueError(
                f"{self.run.folder} is finished, and not with these settings ({'; '.join(changed)}); replace it with "
                "--overwrite, or choose another --output_dir"
            )
        if self.accelerator.is_main_process:
            self.run.take_place()
            logger.info("the run in %s is finished; its model stays as it is", self.run.output)
        self.accelerator.wait_for_everyone()
        return SparcModel.from_pretrained(self.run.output).to(self.accelerator.device).eval()

    def _train_step(self, share: dict[str, Tensor], rows_of_step: int) -> None:
        """Make one optimizer step from this process's share of the step's rows."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._only_source() as source:
            pieces = self._add_gradients(share, rows_of_step, source)
        self._share_gradients(math.ceil(math.ceil(rows_of_step / self.world_size) / pieces))
        if self.args.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self._push.apply(rows_of_step, self.world_size)
        if isinstance(self.scheduler, ScheduleAfterUpdate):
            self.scheduler.count_update(self.config.stream_names.index(source["source"]) if source else None)
        self.scheduler.step()
        self._sums.count_step()
        self._rows_since += rows_of_step

    def _add_gradients(self, share: dict[str, Tensor], rows_of_step: int, source: dict[str, str]) -> int:
        """Add up the gradients of this process's micro-batches; return how many there were."""
        # Processes differ by at most one row, so the smallest share bounds the micro-batches all can make.
        pieces = min(self.args.gradient_accumulation_steps, rows_of_step // self.world_size)
        parts = {name: value.tensor_split(pieces) for name, value in share.items()}
        micro_batches = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        present = [self._given.present(rows) for rows in micro_batches]
        selected: list[Any] = [None] * pieces
        if pieces > 1 and self.model.objective.knows_dead_latents:
            with self.accelerator.autocast():
                # Rows go to the device twice rather than stay there: less memory is what accumulation is for.
                selected = self.model.begin_step(map(self._on_device, micro_batches), present=present)
        share_rows, longer = divmod(rows_of_step, self.world_size)
        first = self.rank * share_rows + min(self.rank, longer)
        for number, rows in enumerate(micro_batches):
            count = len(next(iter(rows.values())))
            alone = self._given.alone_in(self.step, rows_of_step, first, count, present[number])
            first += count
            known = {"selected": selected.pop(0), "present": present[number], "alone": alone, **source}
            output = self.model(self._on_device(rows), new_step=number == 0, **known)
            weight = count / rows_of_step
            self._sums.add(output.loss, output.losses, weight)
            self._push.add(output.codes)
            if number == pieces - 1:
                self._check_signals(at_once=self.accelerator.device.type == "cpu")
            self.accelerator.backward(output.loss * weight)
        return pieces

    def _add_statistics(self, features: FeatureDataset) -> None:
        settings = self.args.imputation_settings()
        add_statistics(self.model, features, rank=self.rank, world_size=self.world_size, **settings)

    def _on_device(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: rows.to(self.accelerator.device, non_blocking=True) for name, rows in features.items()}

    @contextlib.contextmanager
    def _only_source(self) -> Iterator[dict[str, str]]:
        """Give the model's argument `source`, where the objective has one, and let nothing else ask for gradients."""
        if not isinstance(self._adam, UsaeAdamW):
            yield {}
            return
        source = self._source_of_step()
        with self._adam.only(source):
            yield {"source": source}

    def _source_of_step(self) -> str:
        """Draw the source stream of a step, the same on every process and in a resumed run."""
        names = self.config.stream_names
        return names[int(np.random.default_rng([self.args.seed, SOURCE_DRAWS, self.step]).integers(len(names)))]

    def _share_gradients(self, rows: int) -> None:
        """Make every process's gradients those of the whole step; `rows` is the most any has in a micro-batch."""
        terms = self.model.gradient_terms
        if self.world_size > 1:
            self._exchanged = gather_terms(terms, rows) if terms is not None else 0
            self._exchanged += sum_gradients(self.model.parameters())
        if self._needs_dense_gradients:
            add_up_terms(self.model)

    def _after_step(self, epoch: int) -> None:
        """Do what is due after a step: re-initialise, log, save, stop."""
        args = self.args
        # The earlier code counts steps from 0 and looks whenever that number is a multiple, step 0 included.
        if args.reinitialize_every and self.step % args.reinitialize_every == 0:
            draws = torch.Generator().manual_seed(args.seed * 1_000_003 + self.step)
            self.model.reinitialize_dead_latents(draws)
        self.step += 1
        self._bar.update(1)
        if self.step % args.logging_every == 0 or self.step == self.total_steps:
            self._check_signals(at_once=True)
            self._log_progress(epoch)
        if self._stop_signal:
            folder = self._save_checkpoint()
            raise TrainingInterrupted(
                f"stopped by signal {self._stop_signal} after step {self.step}; the state is saved in {folder}; "
                "continue with --resume",
                self._stop_signal,
            )
        if args.checkpoint_every and self.step % args.checkpoint_every == 0 and self.step < self.total_steps:
            self._check_signals(at_once=True)
            self._save_checkpoint()

    def _check_signals(self, at_once: bool) -> None:
        """Agree over all processes whether to stop and whether a loss is still finite.

        Reading the verdict stalls a GPU, so there it is asked for only when something is logged or saved.
        """
        if not at_once:
            return
        broken = self._sums.first_broken_term()
        verdict = torch.tensor([self._signals.number, int(broken is not None)], device=self.accelerator.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(verdict, op=torch.distributed.ReduceOp.MAX)
        self._stop_signal = int(verdict[0])
        if verdict[1]:
            where = f"`{broken}`" if broken else "another process's terms"
            newest = self.checkpoints.newest()
            advice = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
            raise FloatingPointError(
                f"the loss became NaN or infinite at step {self.step} (first in {where}); {advice}; "
                "lower --learning_rate or look for extreme rows in the features"
            )

    def _log_progress(self, epoch: int) -> None:
        means = self._sums.means(self.world_size)
        self._sums = LossSums(self.accelerator.device)
        now = time.perf_counter()
        rate = self._rows_since / max(now - self._clock, 1e-9)
        self._clock, self._rows_since = now, 0
        entry = {f"train/{name}": value for name, value in means.items()}
        entry |= {"dead_share": self._dead_share(), "rows_per_second": rate}
        if self.world_size > 1:
            entry["exchanged_megabytes_per_step"] = self._exchanged / 1e6
        entry |= self._learning_rates()
        self._bar.set_postfix(
            {"loss": f"{means['loss']:.4f}", "dead": f"{entry['dead_share']:.1%}", "rows/s": f"{rate:,.0f}"},
            refresh=False,
        )
        self._report(entry, epoch)

    def _report(self, values: dict[str, float], epoch: int) -> None:
        """Send values to the trackers and append them to the log."""
        if not values:
            return
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            path = self.run.folder / LOG_FILE
            with (
                writing(f"`{path}`", "make room, and continue with --resume from the last checkpoint"),
                open(path, "a", encoding="utf-8") as log,
            ):
                log.write(json.dumps({"step": self.step, "epoch": epoch, **values}) + "\n")

    def _learning_rates(self) -> dict[str, float]:
        rates = [float(rate) for rate in self.scheduler.get_last_lr()]
        if isinstance(self.scheduler, ScheduleAfterUpdate) and len(rates) > 1:
            return {f"learning_rate/{name}": rate for name, rate in zip(self.streams, rates, strict=True)}
        return {"learning_rate": rates[0]}

    def _dead_share(self) -> float:
        shares = [self.model.dead_latents(name).float().mean() for name in self.streams]
        return torch.stack(shares).mean().item()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Return the mean losses over the validation rows, leaving the model as it was."""
        if self.eval_batches is None:
            return {}
        self.model.eval()
        sums = LossSums(self.accelerator.device)
        for share in self.eval_batches:
            with self.accelerator.autocast():
                output = self.model(self._on_device(share), present=self._given_in_eval.present(share))
            rows = next(iter(share.values())).shape[0]
            sums.add(output.loss, output.losses, rows / len(self.eval_batches.features))
        sums.count_step()
        return {f"eval/{name}": value for name, value in sums.means(self.world_size).items()}

    def _settings(self) -> dict[str, Any]:
        return {**self.args.to_dict(), "sparc_hf": __version__, "torch": torch.__version__, "rows": self.rows}

    def _save_checkpoint(self) -> Path:
        state = {"settings": self._settings()}
        return self.checkpoints.save(self.step, state, self.scheduler.state_dict(), self._sums.state_dict())

    def _resume(self) -> None:
        newest = self.checkpoints.newest_whole(verify=not self.args.no_verify)
        if newest is None:
            logger.warning("there is no checkpoint in %s, so training starts at the beginning", self.run.folder)
            return
        folder, saved = newest
        if changed := self._changes(saved["settings"]):
            raise ValueError(
                f"cannot resume from {folder} with other settings ({'; '.join(changed)}); "
                "use the former settings, or another --output_dir"
            )
        schedule, sums = self.checkpoints.load(folder)
        self.scheduler.load_state_dict(schedule)
        self._sums.load_state_dicts(sums, self.rank, self.world_size)
        self.step = saved["step"]

    def _changes(self, saved: dict[str, Any] | None) -> list[str]:
        """Return what in the settings of an earlier run would make this one another."""
        if saved is None or "rows" not in saved:
            return ["it was not made by `sparc train`"]
        rows = [f"training rows: {saved['rows']} -> {self.rows}"] if saved["rows"] != self.rows else []
        return self.args.differences(saved) + rows

    def _save_model(self, complete: Callable[[Path], Any] | None) -> None:
        if not self.accelerator.is_main_process:
            return
        self.model.zero_grad(set_to_none=True)
        # The last optimizer step moved the atoms a little off unit norm.
        self.model.prepare_atoms_for_step()
        self.run.finish(self.model, complete)

    def _progress_bar(self) -> Any:
        # A log file gets a line now and then instead of ten a second.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        return tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step", mininterval=interval)
