"""How the demo encoders are trained: captions wrong by one word, the tower CLIP starts from, what it learns."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401 the offline switches are set there
from torch.nn import functional as F
from transformers import AutoModel

from sparc_hf.demo.encoder_training import train as train_encoders
from sparc_hf.demo.encoder_training.clip import (
    CaptionSampler,
    ClipRecipe,
    build_clip,
    build_tokenizer,
    contrastive_loss,
    encode_captions,
    train_clip,
)
from sparc_hf.demo.encoder_training.dino import DinoRecipe, build_dino, train_dino
from sparc_hf.demo.encoder_training.image_tower import copy_image_tower
from sparc_hf.demo.encoder_training.steps import normalised, to_pixels
from sparc_hf.demo.encoder_training.train import draw_scenes
from sparc_hf.demo.encoder_training.word_swaps import WordSwaps, object_phrases
from sparc_hf.demo.taxonomy import (
    COLOUR_IDS,
    SHAPE_IDS,
    SHAPE_SYNONYMS,
    TEXTURE_IDS,
    WORD_CLASSES,
    plural,
)

OBJECT_CLASSES = {*SHAPE_IDS, *COLOUR_IDS, *TEXTURE_IDS}


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes("encoders", 400)


def words_of(tokenizer, token_ids) -> list[str]:
    return tokenizer.decode(token_ids, skip_special_tokens=True).split()


def test_wrong_captions_differ_in_one_word_that_no_caption_of_the_scene_has(scenes):
    captions = scenes[1]
    tokenizer = build_tokenizer(caption for of_scene in captions for caption in of_scene)
    token_ids = encode_captions(tokenizer, captions)
    numbers = np.arange(len(captions))
    variants, valid = WordSwaps(tokenizer, token_ids).swapped(token_ids[:, 0], numbers, 3, np.random.default_rng(0))
    assert valid.mean() > 0.95
    replaced = set()
    for scene, variant in zip(*np.nonzero(valid), strict=True):
        old, new = words_of(tokenizer, token_ids[scene, 0]), words_of(tokenizer, variants[scene, variant])
        assert len(old) == len(new)
        changes = [(one, other) for one, other in zip(old, new, strict=True) if one != other]
        (change,) = [pair for pair in changes if not set(pair) <= {"a", "an"}]
        named = {WORD_CLASSES.get(word) for caption in captions[scene] for word in caption.split(" ")}
        put_in = WORD_CLASSES.get(change[1])
        assert WORD_CLASSES.get(change[0]) != put_in or put_in is None
        assert put_in not in OBJECT_CLASSES or put_in not in named
        for article, noun in itertools.pairwise(new):
            assert article not in ("a", "an") or (article == "an") == (noun[0] in "aeiou")
        replaced.add(change[0])
    assert {"red", "circle", "striped", "small", "dark", "left"} <= replaced
    assert replaced & {plural(word) for words in SHAPE_SYNONYMS for word in words}


def test_variants_of_a_caption_change_different_words(scenes):
    tokenizer = build_tokenizer(caption for of_scene in scenes[1] for caption in of_scene)
    token_ids = encode_captions(tokenizer, [["a small red striped circle on the left"]])
    variants, _ = WordSwaps(tokenizer, token_ids).swapped(token_ids[:, 0], np.array([0]), 5, np.random.default_rng(1))
    changed = {int(np.flatnonzero(variant != token_ids[0, 0])[0]) for variant in variants[0]}
    assert len(changed) == 5
    nothing = encode_captions(tokenizer, [["we see"]])
    assert (
        not WordSwaps(tokenizer, nothing).swapped(nothing[:, 0], np.array([0]), 2, np.random.default_rng(1))[1].any()
    )


def test_phrases_of_single_objects():
    captions = [
        "we see a small red striped circle beside an orange box on a dark backdrop",
        "a dotted heart in pink",
        "two circles in red and blue",
        "an orange box",
    ]
    assert object_phrases(captions) == ["a small red striped circle", "an orange box", "a dotted heart in pink"]


def test_the_copied_tower_computes_what_its_source_does(scenes):
    torch.manual_seed(0)
    source = build_dino(DinoRecipe(registers=0)).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "lambda" in name or "bias" in name:
                parameter.uniform_(0.2, 1)
    clip = build_clip(build_tokenizer(scenes[1][0]), ClipRecipe()).eval()
    copy_image_tower(source, clip)
    clip.vision_model.pre_layrnorm = torch.nn.Identity()
    pixels = normalised(to_pixels(scenes[0][:3]))
    with torch.no_grad():
        expected = source(pixel_values=pixels).last_hidden_state
        found = clip.vision_model.post_layernorm(clip.vision_model(pixel_values=pixels).last_hidden_state)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def tiny_encoders(images, captions) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    dino, _ = train_dino(images, recipe=DinoRecipe(steps=2, batch_size=16, silhouette_clusters=4))
    clip, _ = train_clip(images, captions, dino, recipe=ClipRecipe(steps=2, batch_size=16))
    return dino.state_dict(), clip.state_dict()


def test_training_twice_gives_the_same_weights(scenes):
    images, captions = scenes[0][:80], scenes[1][:80]
    for first, second in zip(tiny_encoders(images, captions), tiny_encoders(images, captions), strict=True):
        assert all(torch.equal(values, second[name]) for name, values in first.items())


@pytest.mark.parametrize("valid", [False, True])
def test_a_wrong_caption_counts_only_where_there_is_one(valid):
    """Two images and their texts are the axes of a plane; the wrong caption of each is its right one."""
    axes = torch.eye(2)
    loss = contrastive_loss(axes, axes, axes[:, None], torch.full((2, 1), valid), torch.tensor(3.0))
    other = np.exp(-3.0)
    to_text = np.log(2 + other) if valid else np.log(1 + other)
    assert loss.item() == pytest.approx((to_text + np.log(1 + other)) / 2, rel=1e-5)


def test_texts_are_captions_or_phrases_with_variants(scenes):
    captions = scenes[1][:50]
    tokenizer = build_tokenizer(caption for of_scene in captions for caption in of_scene)
    rows, rng = np.arange(50), np.random.default_rng(0)
    for share in (0.0, 1.0):
        recipe = ClipRecipe(phrase_share=share, wrong_captions=2)
        ids, valid = CaptionSampler(tokenizer, captions, recipe).draw(rows, rng)
        assert ids.shape == (50, 3, 32)
        assert valid.shape == (50, 2)
        for number, of_scene in enumerate(captions):
            phrases = object_phrases(of_scene)
            right = encode_captions(tokenizer, [phrases if share and phrases else of_scene])[0]
            assert (right == ids[number, 0]).all(axis=1).any()


def test_training_learns_which_word_is_wrong():
    """A tiny CLIP and 16 scenes that it saw: the share of captions nearer to their image than every wrong variant."""
    images, captions = draw_scenes("encoders", 16)
    small = {"hidden_size": 32, "vision_layers": 1, "text_layers": 1, "batch_size": 16, "learning_rate": 5e-3}

    def share_of_right(steps: int) -> float:
        clip, processor = train_clip(images, captions, recipe=ClipRecipe(steps=steps, **small))
        token_ids = encode_captions(processor.tokenizer, captions)
        swaps = WordSwaps(processor.tokenizer, token_ids)
        wrong, valid = swaps.swapped(token_ids[:, 0], np.arange(16), 3, np.random.default_rng(7))
        with torch.no_grad():
            rows = F.normalize(
                clip.get_image_features(pixel_values=normalised(to_pixels(images))).pooler_output, dim=-1
            )
            flat = torch.from_numpy(np.concatenate([token_ids[:, :1], wrong], axis=1)).flatten(0, 1)
            texts = F.normalize(clip.get_text_features(input_ids=flat).pooler_output, dim=-1).view(16, 4, -1)
        cosines = torch.einsum("bd,bvd->bv", rows, texts)
        return (cosines[:, :1] > cosines[:, 1:])[torch.from_numpy(valid)].float().mean().item()

    assert share_of_right(250) > max(0.8, share_of_right(0) + 0.2)


def test_clip_alone_wants_the_vision_only_encoder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_encoders", "--output", str(tmp_path), "--only", "clip"])
    with pytest.raises(SystemExit):
        train_encoders.main()
    assert f"there is no {tmp_path / 'dino'}" in capsys.readouterr().err


def test_the_command_starts_clip_from_the_encoder_it_trained(tmp_path, monkeypatch):
    """With CLIP's learning rate at 0 its image tower is what it started from."""
    monkeypatch.setattr(train_encoders, "train_dino", partial(train_dino, recipe=DinoRecipe(steps=2, batch_size=8)))
    still = ClipRecipe(steps=1, batch_size=8, learning_rate=0.0, weight_decay=0.0)
    monkeypatch.setattr(train_encoders, "train_clip", partial(train_clip, recipe=still))
    monkeypatch.setattr("sys.argv", ["train_encoders", "--output", str(tmp_path), "--scenes", "100"])
    train_encoders.main()
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 1, "weights for their owner alone, beside configs for all"
    clip, dino = (AutoModel.from_pretrained(tmp_path / name) for name in ("clip", "dino"))
    expected = dino.embeddings.cls_token[0, 0]
    assert torch.equal(clip.vision_model.embeddings.class_embedding, expected)
