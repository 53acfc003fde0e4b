"""Paints the scenes of :mod:`~group_sampling.data.synthetic`: background, figures from far to near, exposure."""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from .synthetic_head import LARGE_CIRCLE, SKIN, SQUARE, Color, Sprite, between, dim, draw_ball, draw_head, random_color
from .synthetic_scene import Figure, Scene, Shape

_GRAIN_SHIFTS = 64
_BACKGROUND_REDUCTION = 4  # the background is painted at a quarter of the size: it is out of focus


def paint(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint ``scene``; return (height, width, 3) uint8 RGB."""
    canvas = _background(scene.height, scene.width, rng)
    _clutter(canvas, rng)
    light = rng.uniform(-0.9, 0.9), rng.uniform(-0.9, 0.2)
    for figure in scene.figures:
        _paint_figure(canvas, figure, light, rng)
    return _expose(canvas, rng)


def _background(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    small = max(8, width // _BACKGROUND_REDUCTION), max(8, height // _BACKGROUND_REDUCTION)
    # Gray noise, each octave with half the frequency of the one before and about twice its weight ...
    octaves = [
        Image.fromarray(rng.integers(0, 256, size=(cells, cells + 1), dtype=np.uint8)).resize(
            small, Image.Resampling.BILINEAR
        )
        for cells in (96, 48, 24, 12, 6, 3)
    ]
    noise = functools.reduce(lambda finer, octave: Image.blend(finer, octave, 0.45), octaves)
    # ... turned into the colors between two, under a wash of others.
    first, second = rng.uniform(20, 235, size=(2, 1, 1)) + rng.normal(0, 28, size=(2, 3, 1))
    curves = (first + (second - first) * np.linspace(-0.2, 1.2, 256)).clip(0, 255).astype(np.uint8).tolist()
    texture = Image.merge("RGB", [noise.point(curve) for curve in curves])
    wash = Image.fromarray(rng.integers(0, 256, size=(3, 4, 3), dtype=np.uint8)).resize(
        small, Image.Resampling.BILINEAR
    )
    texture = Image.blend(texture, wash, rng.uniform(0, 0.3))
    draw = ImageDraw.Draw(texture)
    for _ in range(rng.integers(0, 9)):  # walls, windows, furniture
        x, y = rng.uniform(-0.2, 1, size=2) * small
        w, h = rng.uniform(0.05, 0.5, size=2) * small
        draw.rectangle(
            (x, y, x + w, y + h), fill=random_color(rng), outline=random_color(rng) if rng.random() < 0.5 else None
        )
    half = texture.resize(((width + 1) // 2, (height + 1) // 2), Image.Resampling.BILINEAR)
    return half.resize((width, height), Image.Resampling.NEAREST)  # half the time; invisible in a blur


def _clutter(canvas: Image.Image, rng: np.random.Generator) -> None:
    """Sharp things that are not faces: poles, discs, rings, polygons, windows, lines of text."""
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    for kind in rng.integers(0, 6, size=rng.integers(2, 12)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        size = math.exp(rng.uniform(math.log(6), math.log(0.4 * height)))
        color = random_color(rng)
        if kind == 0:
            end = x + rng.normal(0, size), y + rng.normal(0, size)
            draw.line((x, y, *end), fill=color, width=int(1 + size / 12))
        elif kind == 1:
            draw.ellipse((x, y, x + size, y + size * rng.uniform(0.7, 1.3)), fill=color)
        elif kind == 2:
            draw.ellipse((x, y, x + size, y + size), outline=color, width=int(1 + size / 10))
        elif kind == 3:
            corners = rng.normal(0, size / 2, size=(rng.integers(3, 6), 2)) + [x, y]
            draw.polygon([tuple(corner) for corner in corners], fill=color)
        elif kind == 4:
            _windows(draw, x, y, size, rng)
        else:
            _text(draw, x, y, max(4.0, size / 6), color, rng)


def _windows(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, rng: np.random.Generator) -> None:
    """A grid of dark or bright panes."""
    columns, rows = rng.integers(1, 5), rng.integers(1, 5)
    pitch, pane, color = size / 3, size / 3 * rng.uniform(0.4, 0.8), random_color(rng)
    draw.rectangle((x - pitch / 4, y - pitch / 4, x + columns * pitch, y + rows * pitch), fill=random_color(rng))
    for column in range(columns):
        for row in range(rows):
            left, top = x + column * pitch, y + row * pitch
            draw.rectangle((left, top, left + pane, top + pane), fill=color)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, color: Color, rng: np.random.Generator) -> None:
    """One line of something that looks like letters: strokes on a grid, no font needed."""
    for stroke in rng.integers(0, 5, size=(rng.integers(3, 12), 3)):
        for kind in stroke:
            ends = ((0, 0, 0, 1), (0, 0, 0.6, 0), (0.6, 0, 0.6, 1), (0, 0.5, 0.6, 0.5), (0, 1, 0.6, 0))[kind]
            line = x + ends[0] * size, y + ends[1] * size, x + ends[2] * size, y + ends[3] * size
            draw.line(line, fill=color, width=int(1 + size / 8))
        x += 0.9 * size


def _paint_figure(canvas: Image.Image, figure: Figure, light: tuple[float, float], rng: np.random.Generator) -> None:
    head, body = figure.head, figure.body
    skin = between(SKIN, rng)
    if body is not None:
        neck_y = (head.y + body.y - body.half_height) / 2 + 0.5 * head.half_height
        neck_size = 0.5 * head.half_width, 0.6 * head.half_height
        neck = Shape(head.x, neck_y, *neck_size, head.angle / 2, is_ellipse=False)
        _fill(canvas, neck, dim(skin, rng.uniform(0.55, 0.8)))
        _fill(canvas, body, random_color(rng))
    sprite = Sprite(head, canvas.size)
    if figure.kind == "ball":
        draw_ball(sprite, rng)
    else:
        draw_head(sprite, skin, figure.kind, rng)
    # A blurred head keeps ten pixels or more; blowing up the largest would cost too much.
    max_blur = min(5, int(head.half_height / 5)) if head.half_height < 120 else 1
    blur = int(rng.integers(2, max_blur + 1)) if max_blur >= 2 and rng.random() < 0.25 else 1
    sprite.paste(canvas, light, contrast=rng.uniform(0.2, 0.75), brightness=rng.uniform(0.6, 1), blur=blur)
    if figure.occluder is not None:
        _fill(canvas, figure.occluder, random_color(rng))


def _fill(canvas: Image.Image, shape: Shape, color: Color) -> None:
    points = shape.at(LARGE_CIRCLE if shape.is_ellipse else SQUARE)
    ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=color)


def _expose(canvas: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Contrast, brightness and a tint, then grain; returns (height, width, 3) uint8."""
    gain, bias = rng.uniform(0.6, 1.25) * rng.uniform(0.93, 1.07, size=(3, 1)), rng.uniform(-20, 40)
    grain_bits = int(rng.integers(1, 6))
    curves = (128 + (np.arange(256) - 128) * gain + bias).clip(0, 256 - 2**grain_bits)  # room for the grain
    pixels = np.array(canvas.point(curves.astype(np.uint8).ravel().tolist()))
    left, top = rng.integers(0, _GRAIN_SHIFTS, size=2)
    pixels += _grain(*canvas.size)[top : top + canvas.height, left : left + canvas.width] >> (8 - grain_bits)
    return pixels


@functools.lru_cache(maxsize=4)
def _grain(width: int, height: int) -> np.ndarray:
    """White noise, the same for all images of a size: they differ by which part of it they take."""
    size = height + _GRAIN_SHIFTS, width + _GRAIN_SHIFTS, 3
    return np.random.default_rng(0).integers(0, 256, size=size, dtype=np.uint8)
