"""What stands out of a scene, found by a fixed rule: where it lies, its silhouette, its colour and its texture."""

from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

from .raster import IMAGE_SIZE

SILHOUETTE = 16
# Square of pixels; smaller blobs are specks of the background, larger ones parts of it.
BLOB_AREA = (20, 1800)
BORDER_PIXELS = 4
# Pixels between the two points of a texture's autocorrelation; the finest period of the scenes is 4.6.
DISTANCES = (1, 2, 3, 4, 5)
# Contrast within a blob, in 0..1 of light, from which its texture counts in full.
FULL_CONTRAST = 0.1
_LEAST_PIXELS = 15


class Blobs(NamedTuple):
    """What stands out of one image.

    Attributes:
        owner: int64 [patches], the blob that covers most of a patch, -1 where less than a quarter is covered.
        silhouettes: float32 [blobs, 256], centred and brought to one size, 0..1.
        colours: float32 [blobs, 3], mean colour, 0..1.
        textures: float32 [blobs, 10], least and largest autocorrelation over all directions at each distance.
    """

    owner: np.ndarray
    silhouettes: np.ndarray
    colours: np.ndarray
    textures: np.ndarray


def find_blobs(image: np.ndarray, patch_size: int) -> Blobs:
    """Find the connected areas of a uint8 image [64, 64, 3] that are far from its median colour."""
    pixels = image.astype(np.float32) / 255
    smooth = ndimage.uniform_filter(pixels, (3, 3, 1))  # pyright: ignore[reportArgumentType]
    distance = np.linalg.norm(smooth - np.median(pixels.reshape(-1, 3), axis=0), axis=2)
    # Opening removes lines and grains of the background.
    opened = ndimage.binary_opening(distance > 0.25, np.ones((3, 3)))
    areas, count = ndimage.label(opened)  # pyright: ignore[reportGeneralTypeIssues]
    masks = [mask for mask in (areas == number for number in range(1, count + 1)) if _is_object(mask)]
    if not masks:
        empty = (np.empty((0, width), np.float32) for width in (SILHOUETTE**2, 3, 2 * len(DISTANCES)))
        return Blobs(np.full((IMAGE_SIZE // patch_size) ** 2, -1), *empty)
    return Blobs(
        _owners(np.stack(masks), patch_size),
        np.stack([_silhouette(mask) for mask in masks]),
        np.stack([pixels[mask].mean(axis=0) for mask in masks]),
        np.stack([_texture(pixels, mask) for mask in masks]),
    )


def _is_object(mask: np.ndarray) -> bool:
    border = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    return BLOB_AREA[0] <= mask.sum() <= BLOB_AREA[1] and border <= BORDER_PIXELS


def _owners(masks: np.ndarray, patch_size: int) -> np.ndarray:
    """The blob of every patch, int64 [patches], from masks [blobs, 64, 64]."""
    side = IMAGE_SIZE // patch_size
    covered = masks.reshape(len(masks), side, patch_size, side, patch_size).mean(axis=(2, 4)).reshape(len(masks), -1)
    return np.where(covered.max(axis=0) >= 0.25, covered.argmax(axis=0), -1)


def _silhouette(mask: np.ndarray) -> np.ndarray:
    """Return the mask [64, 64] in the middle of a 16x16 square, just filling it, as float32 [256]."""
    rows, columns = np.nonzero(mask)
    side = 1.15 * max(np.ptp(rows), np.ptp(columns), 4)
    steps = (np.arange(SILHOUETTE) + 0.5) / SILHOUETTE - 0.5
    middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    grid = np.meshgrid(middle[0] + steps * side, middle[1] + steps * side, indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1).reshape(-1)


def _rings() -> list[np.ndarray]:
    """For each distance the lags of about this length, as flat positions in an array [2 * 64, 2 * 64]."""
    steps = np.fft.fftfreq(2 * IMAGE_SIZE, 1 / (2 * IMAGE_SIZE))
    lengths = np.rint(np.hypot(steps[:, None], steps[None, :])).reshape(-1)
    return [np.flatnonzero(lengths == distance) for distance in DISTANCES]


_RINGS = _rings()


def _autocorrelation(values: np.ndarray) -> np.ndarray:
    """Sums of products of an array [64, 64] with itself moved by every lag, flat [(2 * 64) ** 2]."""
    size = (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    return fft.irfft2(np.abs(fft.rfft2(values, size)) ** 2, size).reshape(-1)


def _texture(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return float32 [10]: how alike points of a blob are, by their distance, at least and at most over directions.

    A plain blob has zeros; stripes are alike along themselves and unlike across; dots and squares differ in how fast
    likeness falls and comes back; shading stays alike over all distances.
    """
    inner = ndimage.binary_erosion(mask, np.ones((3, 3)))
    inner = mask if inner.sum() < _LEAST_PIXELS else inner
    deviations = pixels[inner] - pixels[inner].mean(axis=0)
    variances, axes = np.linalg.eigh(deviations.T @ deviations / len(deviations))
    light = np.zeros(mask.shape)
    light[inner] = deviations @ axes[:, -1]
    variance = max(float(variances[-1]), 1e-6)
    pairs = _autocorrelation(inner.astype(np.float64))
    likeness = _autocorrelation(light) / np.maximum(pairs, 1) / variance
    rings = [likeness[ring[pairs[ring] > 5]] for ring in _RINGS]
    ends = [end for ring in rings for end in ((ring.min(), ring.max()) if len(ring) else (0.0, 0.0))]
    return np.array(ends, np.float32) * min(variance**0.5 / FULL_CONTRAST, 1.0)
