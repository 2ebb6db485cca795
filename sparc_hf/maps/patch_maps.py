"""Where in images targets are, as each stream's patches show it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.maps.methods import check_map_settings, map_method, patch_scores
from sparc_hf.maps.targets import StreamTargets, Target, targets_per_sample
from sparc_hf.model.modeling_sparc import SparcModel


def image_maps(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    images: Sequence[Image.Image],
    targets: Sequence[Target] | Sequence[Sequence[Target]],
    method: str = "relevance",
    *,
    start_layer: int = 0,
    shifts: int = 1,
    batch_size: int = 16,
) -> dict[str, np.ndarray]:
    """Return where in each image each target is, as the image streams see it.

    All targets of an image share one pass through its encoder.

    Args:
        model: the model.
        encoders: stream -> its encoder, see `load_encoders`; those of text streams only serve similarity targets.
        images: PIL images of any mode and size.
        targets: the same for all images, or a list an image.
        method: "relevance"; "grad_cam", at the first norm of the last block; or "patch_codes", which encodes each
            patch token by itself, without gradients, and reads the latents there. Streams of patch tokens have the
            last only (`map_method`).
        start_layer: first block that relevance counts, from the end where negative.
        shifts: with n above 1, the mean of maps of the image shifted by 0, 1/n, ... of a patch along both axes, which
            shows more than one map's grid does and costs n * n times its time.
        batch_size: images at a time.

    Returns:
        stream -> float32 [images, targets, rows, columns], 0 or more, of the stream's patch grid, or with shifts, of
        one 2n times as fine; see `visible_box` for the part of the image that it covers. NaN where an image has fewer
        targets, and for a similarity of embeddings in streams that have no space in common with its stream.

    Raises:
        ValueError: for no images, targets, latents or streams that do not exist, or a backbone without such maps.
    """
    check_map_settings(method, shifts)
    lists = targets_per_sample(images, targets, "images")
    streams = {
        name: StreamTargets(model, encoders, name, lists)
        for name, encoder in encoders.items()
        if encoder.modality == "image"
    }
    if not streams:
        raise ValueError(f"none of the streams {list(encoders)} encodes images")
    maps: dict[str, list[np.ndarray]] = {name: [] for name in streams}
    for start in tqdm(range(0, len(images), batch_size), desc="maps", unit="batch", delay=2, leave=False):
        batch = slice(start, start + batch_size)
        for name, stream_targets in streams.items():
            pixels = encoders[name].prepare(images[batch])["pixel_values"]
            maps[name].append(_batch_maps(stream_targets, pixels, batch, method, start_layer, shifts))
    return {name: np.concatenate(batches) for name, batches in maps.items()}


def map_on_image(grid: np.ndarray, box: Sequence[float], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Bring a map to the pixels of its image, bilinearly.

    Args:
        grid: float [rows, columns].
        box: left, top, right, bottom of the part of the image it covers, see `visible_box`.
        size: width and height of the image.

    Returns:
        float32 [height, width], 0 outside the box, and bool [height, width], the pixels in it.
    """
    width, height = size
    left, top, right, bottom = box
    columns = (np.arange(width) + 0.5 - left) / (right - left)
    rows = (np.arange(height) + 0.5 - top) / (bottom - top)
    places = torch.from_numpy(np.stack(np.broadcast_arrays(columns[None], rows[:, None]), axis=-1) * 2 - 1).float()
    source = torch.from_numpy(np.ascontiguousarray(grid, np.float32))[None, None]
    values = F.grid_sample(source, places[None], mode="bilinear", padding_mode="border", align_corners=False)[0, 0]
    seen = ((rows >= 0) & (rows <= 1))[:, None] & ((columns >= 0) & (columns <= 1))[None]
    return np.where(seen, values.numpy(), 0.0).astype(np.float32), seen


def _batch_maps(
    targets: StreamTargets, pixels: Tensor, batch: slice, method: str, start_layer: int, shifts: int
) -> np.ndarray:
    """Return maps [batch, slots, rows, columns] of one stream."""
    encoder, method = targets.encoder, map_method(targets.encoder, method)
    grid = encoder.grid or encoder.grid_of(pixels)
    maps = []
    for offset in np.ndindex(shifts, shifts):
        inputs = {"pixel_values": _moved(pixels, offset, shifts, encoder)}
        scores = patch_scores(targets, inputs, batch, method, start_layer)
        maps.append(_moved_back(scores.reshape(*scores.shape[:2], *grid), offset, shifts))
    return np.mean(maps, axis=0)


def _moved(pixels: Tensor, offset: tuple[int, ...], shifts: int, encoder: StreamEncoder) -> Tensor:
    """Move images [batch, 3, height, width] down and to the right by offset / shifts of a patch; edges repeat."""
    # What a shift brings in repeats the edge, because a black border would draw relevance to itself.
    down, right = (round(n * side / shifts) for n, side in zip(offset, encoder.patch_size, strict=True))
    return F.pad(pixels, (right, 0, down, 0), mode="replicate")[..., : pixels.shape[-2], : pixels.shape[-1]]


def _moved_back(maps: np.ndarray, offset: tuple[int, ...], shifts: int) -> np.ndarray:
    """Bring maps of moved images to a grid 2 * shifts times as fine, and to their place."""
    if shifts == 1:
        return maps
    # With 2 * shifts cells a patch, each shift is a whole number of cells: no second interpolation moves the map back.
    fine = F.interpolate(torch.from_numpy(maps), scale_factor=2.0 * shifts, mode="bilinear", align_corners=False)
    down, right = 2 * offset[0], 2 * offset[1]
    return F.pad(fine, (0, right, 0, down), mode="replicate")[..., down:, right:].numpy()
