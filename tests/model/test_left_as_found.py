"""What only looks at a model leaves it as it was, in training mode too; nothing moves the caller's random numbers."""

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.codes.code_table import encode_features
from sparc_hf.codes.concepts import name_concepts, vocabulary_evidence
from sparc_hf.demo.run import DemoArguments, run_demo
from sparc_hf.demo.scenes import CLASS_NAMES, make_scene, make_scenes_dataset
from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.stream_records import parse_streams
from sparc_hf.maps.explanation import explain_sample
from sparc_hf.maps.maximisation import MaximisationSettings, maximise_latent
from sparc_hf.maps.patch_maps import image_maps
from sparc_hf.maps.scored_words import word_scores
from sparc_hf.maps.targets import ConceptTarget
from sparc_hf.metrics.concept_probe import concept_probe
from sparc_hf.pipeline import SparcPipeline
from sparc_hf.training.arguments import SparcTrainingArguments
from sparc_hf.training.trainer import SparcTrainer, TrainingInterrupted

STREAMS = ("dino=demo:dino:image", "clip_img=demo:clip:image", "clip_txt=demo:clip:text")
COLUMNS = {"image_column": "image", "text_column": "text", "labels_column": "labels", "label_names": CLASS_NAMES}
SCENE = make_scene(5)


class World:
    """Encoders, a few scenes' features, and a model that is in training mode."""

    def __init__(self, folder: Path, objective: str):
        self.folder = folder
        self.encoders = load_encoders(parse_streams(STREAMS))
        self.features = extract_features(make_scenes_dataset("test", 130, 0), self.encoders, folder / "f", **COLUMNS)
        streams = [encoder.record for encoder in self.encoders.values()]
        selection = "local" if objective == "usae" else "global"
        torch.manual_seed(0)
        self.model = SparcModel(
            SparcConfig(streams=streams, num_latents=32, k=6, auxk=8, objective=objective, selection=selection)
        ).train()
        self.codes = encode_features(self.model, self.features, encoding="single")


@pytest.fixture(scope="module", params=["sparc", "usae"])
def world(request, tmp_path_factory):
    return World(tmp_path_factory.mktemp(request.param), request.param)


LOOKS = {
    "encode joint": lambda w: encode_features(w.model, w.features),
    "encode single": lambda w: encode_features(w.model, w.features, encoding="single"),
    "encode a batch": lambda w: w.model.encode({"dino": torch.from_numpy(w.features.array("dino"))}),
    "evaluate": lambda w: evaluate_model(w.model, w.features, EvaluationSettings(replicates=5)),
    "names": lambda w: name_concepts(w.codes, w.features),
    "vocabulary": lambda w: vocabulary_evidence(w.model, w.encoders["clip_txt"], ["red", "blue", "square"]),
    "image maps": lambda w: image_maps(w.model, w.encoders, [SCENE.image], [ConceptTarget((3,))]),
    "words": lambda w: word_scores(w.model, w.encoders, [SCENE.captions[0]], [ConceptTarget((3,))]),
    "explain": lambda w: explain_sample(w.model, w.encoders, SCENE.image, SCENE.captions[0], {"one": [3]}),
    "maximise": lambda w: maximise_latent(
        w.model, {"dino": w.encoders["dino"]}, 3, MaximisationSettings(steps=2, starts=1, random_images=4)
    ),
}


@contextlib.contextmanager
def the_same_random_numbers():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    expected = random.random(), np.random.random(), torch.rand(()).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    yield
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected


@pytest.mark.parametrize("look", LOOKS)
def test_looking_changes_neither_the_model_nor_the_random_numbers(world, look, monkeypatch):
    monkeypatch.setattr(concept_probe.classify, "__kwdefaults__", {"steps": 20, "seed": 0})
    before = {name: value.clone() for name, value in world.model.state_dict().items()}
    with the_same_random_numbers():
        LOOKS[look](world)
    assert all(module.training for module in world.model.modules())
    for name, value in world.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in world.model.parameters())
    assert all(
        parameter.requires_grad == (not name.startswith("pre_bias") or world.model.config.objective == "sparc")
        for name, parameter in world.model.named_parameters()
    )


def test_a_code_does_not_depend_on_its_batch_in_training_mode(world):
    rows = {name: torch.from_numpy(world.features.array(name)) for name in world.features.stream_names}
    with torch.no_grad():
        whole = world.model.encode(rows)
        part = world.model.encode({name: value[:7] for name, value in rows.items()})
    for name, code in part.items():
        assert torch.equal(code.indices, whole[name].indices[:7])


def _train(folder: Path, features: FeatureDataset, **settings) -> None:
    args = SparcTrainingArguments(
        features="", output_dir=str(folder), num_latents=32, k=4, auxk=4, epochs=2, cpu=True, batch_size=40, **settings
    )
    SparcTrainer(args, features, features).train()


def test_making_and_loading_leave_the_random_numbers(world, tmp_path, monkeypatch):
    world.model.save_pretrained(tmp_path / "model")
    with the_same_random_numbers():
        SparcModel.from_pretrained(tmp_path / "model")
    with the_same_random_numbers():
        SparcPipeline.from_pretrained(str(tmp_path / "model"), device="cpu")(text="a red circle")
    with the_same_random_numbers():
        extract_features(make_scenes_dataset("test", 10, 0), load_encoders(parse_streams(STREAMS)), tmp_path / "f")
    with the_same_random_numbers():
        _train(tmp_path / "run", world.features)
    with the_same_random_numbers():
        run_demo(
            DemoArguments(output=str(tmp_path / "demo"), train_rows=64, test_rows=40, num_latents=16, k=2, epochs=1)
        )


def test_a_stopped_and_resumed_run_leaves_the_random_numbers(world, tmp_path, monkeypatch):
    original = SparcTrainer._after_step

    def stop_after_3(trainer, epoch):
        trainer._stop_signal = 15 if trainer.step == 2 else 0
        original(trainer, epoch)

    monkeypatch.setattr(SparcTrainer, "_after_step", stop_after_3)
    with the_same_random_numbers(), pytest.raises(TrainingInterrupted):
        _train(tmp_path / "run", world.features)
    monkeypatch.undo()
    with the_same_random_numbers():
        _train(tmp_path / "run", world.features, resume=True)
