"""Shapes, textures and backgrounds as numpy arrays; supersampled, without a drawing library.

Coordinates are pixels with x to the right and y downwards. Arrays only see + - * / and comparisons, whose results
IEEE 754 fixes, so that the same seed gives the same pixels everywhere.
"""

import math
from collections.abc import Callable

import numpy as np

IMAGE_SIZE = 64
SUPERSAMPLING = 3

Array = np.ndarray

COLOUR_VALUES = np.array(
    [
        (0.86, 0.11, 0.13),  # red
        (0.98, 0.52, 0.05),  # orange
        (0.97, 0.88, 0.12),  # yellow
        (0.98, 0.55, 0.76),  # pink
        (0.13, 0.62, 0.18),  # green
        (0.15, 0.82, 0.85),  # cyan
        (0.12, 0.28, 0.88),  # blue
        (0.54, 0.15, 0.70),  # purple
        (0.97, 0.97, 0.97),  # white
        (0.52, 0.52, 0.53),  # grey
        (0.05, 0.05, 0.06),  # black
        (0.47, 0.27, 0.12),  # brown
    ],
    dtype=np.float32,
)
"""RGB of the colours in the order of `taxonomy.COLOURS`, float32 [12, 3] in 0..1."""


def _half_planes(x: Array, y: Array, sides: int, apothem: float) -> list[Array]:
    angles = [math.pi / 2 + math.pi / sides + 2 * math.pi * side / sides for side in range(sides)]
    return [x * math.cos(a) + y * math.sin(a) <= apothem for a in angles]


def _polygon(x: Array, y: Array, sides: int, radius: float) -> Array:
    return np.logical_and.reduce(_half_planes(x, y, sides, radius * math.cos(math.pi / sides)))


def _semicircle(x: Array, y: Array) -> Array:
    return (x * x + (y + 0.45) ** 2 <= 0.95) & (y >= -0.45)


def _heart(x: Array, y: Array) -> Array:
    x, y = 1.22 * x, 1.22 * y + 0.12
    bulge = x * x + y * y - 1
    return bulge * bulge * bulge <= x * x * y * y * y


def _crescent(x: Array, y: Array) -> Array:
    return (x * x + y * y <= 0.92) & ((x - 0.46) ** 2 + y * y > 0.58)


def _star(x: Array, y: Array) -> Array:
    # A pentagram is the set of points on the inner side of at least four of its five lines.
    inside = _half_planes(x, y, 5, math.cos(2 * math.pi / 5) * 1.12)
    return (np.add.reduce(inside, dtype=np.int8) >= 4) & (x * x + y * y <= 1.25)


def _cross(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return ((x <= 0.29) & (y <= 0.92)) | ((x <= 0.92) & (y <= 0.29))


def _arrow(x: Array, y: Array) -> Array:
    shaft = (abs(y) <= 0.22) & (x >= -0.95) & (x <= 0.2)
    head = (x >= 0.05) & (x + 1.15 * abs(y) <= 1.0)
    return shaft | head


SHAPE_TESTS: tuple[Callable[[Array, Array], Array], ...] = (
    lambda x, y: x * x + y * y <= 0.80,
    lambda x, y: x * x + y * y * 3.6 <= 1.0,
    lambda x, y: abs(x * x + y * y - 0.58) <= 0.33,
    _semicircle,
    _heart,
    _crescent,
    lambda x, y: (abs(x) <= 0.75) & (abs(y) <= 0.75),
    lambda x, y: abs(x) * 1.6 + abs(y) <= 1.0,
    lambda x, y: _polygon(x, y, 5, 1.0),
    lambda x, y: _polygon(x, y, 6, 0.98),
    _cross,
    lambda x, y: _polygon(x, y + 0.15, 3, 1.1),
    _star,
    _arrow,
)
"""Inside tests in the order of `taxonomy.SHAPES`; x, y of any equal shape, y upwards, the shape within about -1..1."""

# Largest turn of each shape to either side, in radians. Turned further, a square would read as a diamond and an
# ellipse as another ellipse; crescents, domes and arrows stay what they are.
MAX_TURN = (0.0, 0.6, 0.0, 0.6, 0.3, math.pi, 0.25, 0.25, 0.3, 0.25, 0.25, 0.3, 0.3, math.pi)


def _samples(low: int, high: int) -> Array:
    count = (high - low) * SUPERSAMPLING
    return low + (np.arange(count, dtype=np.float32) + 0.5) / SUPERSAMPLING


def _pool(samples: Array) -> Array:
    """Mean over the samples of each pixel: [h * S, w * S, ...] -> [h, w, ...]."""
    rows, columns = samples.shape[0] // SUPERSAMPLING, samples.shape[1] // SUPERSAMPLING
    shape = (rows, SUPERSAMPLING, columns, SUPERSAMPLING)
    return samples.reshape(shape).sum(axis=(1, 3), dtype=np.float32) / SUPERSAMPLING**2


def _texture_weight(kind: int, x: Array, y: Array, angle: float, period: float, radius: float) -> Array:
    """Share of the second colour at every sample, float32 or bool, same shape as x; kinds as `taxonomy.TEXTURES`."""
    cosine, sine = math.cos(angle), math.sin(angle)
    u, v = x * cosine + y * sine, y * cosine - x * sine
    if kind == 1:
        return np.clip(0.5 + u / (1.7 * radius), 0, 1)
    u, v = u / period + 64, v / period + 64
    if kind == 2:
        return u - np.floor(u) < 0.5
    if kind == 3:
        u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
        return u * u + v * v < 0.10
    return ((2 * u).astype(np.int32) + (2 * v).astype(np.int32)) % 2 == 1


def paint_object(
    shape: int,
    texture: int,
    centre: tuple[float, float],
    radius: float,
    turn: float,
    pattern: tuple[float, float],
) -> tuple[tuple[slice, slice], Array, Array]:
    """Rasterise one object.

    Args:
        shape: index into `taxonomy.SHAPES`.
        texture: index into `taxonomy.TEXTURES`.
        centre: x and y in pixels.
        radius: in pixels.
        turn: rotation in radians.
        pattern: angle in radians and period in pixels of the texture.

    Returns:
        The window of the image as (rows, columns), the coverage float32 [h, w] and the share of the second colour
        float32 [h, w], both in 0..1.
    """
    left, top = (max(0, math.floor(value - 1.15 * radius)) for value in centre)
    right, bottom = (min(IMAGE_SIZE, math.ceil(value + 1.15 * radius)) for value in centre)
    x = _samples(left, right)[None, :] - centre[0]
    y = _samples(top, bottom)[:, None] - centre[1]
    cosine, sine = math.cos(turn) / radius, math.sin(turn) / radius
    inside = SHAPE_TESTS[shape](x * cosine - y * sine, -x * sine - y * cosine)
    window = (slice(top, bottom), slice(left, right))
    coverage = _pool(inside)
    if texture == 0:
        return window, coverage, np.zeros_like(coverage)
    return window, coverage, _pool(_texture_weight(texture, x, y, pattern[0], pattern[1], radius))


def _upsample(grid: Array) -> Array:
    """Bilinear enlargement of [c, c] to float32 [64, 64]."""
    position = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) * ((len(grid) - 1) / IMAGE_SIZE)
    low = position.astype(np.int32)
    share = (position - low)[:, None]
    rows = grid[low] * (1 - share) + grid[low + 1] * share
    return rows[:, low] * (1 - share.T) + rows[:, low + 1] * share.T


def paint_background(kind: int, dark: bool, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw a background.

    Args:
        kind: index into `taxonomy.BACKGROUNDS`.
        dark: dark tone or light tone.
        rng: source of its colour and pattern.

    Returns:
        Pixels float32 [64, 64, 3] in 0..1 and their base colour float32 [3].
    """
    tint = rng.random(3, dtype=np.float32)
    base = 0.05 + 0.20 * tint if dark else 0.76 + 0.20 * tint
    draws = rng.random(4)
    angle, period = 2 * math.pi * draws[0], 6 + 5 * draws[1]
    axis = np.arange(IMAGE_SIZE, dtype=np.float32)
    if kind == 0:
        pattern = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    elif kind == 1:
        ramp = (axis - 31.5) / 45
        pattern = 0.24 * (ramp[None, :] * math.cos(angle) + ramp[:, None] * math.sin(angle))
    elif kind == 2:
        pattern = 0.26 * (rng.random((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32) - 0.5)
    elif kind == 3:
        line_x, line_y = ((axis + period * offset) % period < 1.2 for offset in draws[2:])
        pattern = (0.20 if dark else -0.20) * (line_x[None, :] | line_y[:, None]).astype(np.float32)
    else:
        pattern = _upsample(0.30 * (rng.random((7, 7), dtype=np.float32) - 0.5))
    return base + pattern[:, :, None], base
