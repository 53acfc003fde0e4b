"""Paints one head, a face or something that only looks like one, as a sprite.

A sprite is drawn with Pillow's primitives, with several samples a pixel where it is small, then shaded and pasted.
Head coordinates (u, v) have their origin at the center of the head, v = -1 at the top of the forehead and v = 1 at the
chin; u has the same unit, and a head without rotation has u to the right.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from .synthetic_scene import Shape

Color = tuple[int, int, int]

SKIN = np.array([(255, 224, 196), (244, 198, 160), (226, 172, 130), (190, 130, 92), (140, 92, 62), (88, 56, 40)])
_HAIR = np.array([(24, 20, 18), (52, 36, 26), (92, 60, 36), (150, 108, 60), (206, 172, 110), (150, 148, 146)])
_IRIS = np.array([(48, 28, 16), (82, 52, 28), (70, 96, 70), (88, 120, 160)])


def _circle(points: int) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, points, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


_CIRCLE, LARGE_CIRCLE = _circle(20), _circle(48)
SQUARE = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])


class Sprite:
    """A head on a small canvas of its own, turned already; positions and lengths are in head coordinates."""

    HALF_WIDTH, HALF_HEIGHT = 1.1, 1.25  # how far hair and hats reach

    def __init__(self, head: Shape, canvas_size: tuple[int, int]) -> None:
        self.half_width = head.half_width / head.half_height  # of the head, in u
        self._cos, self._sin = math.cos(head.angle), math.sin(head.angle)
        reach_x = head.half_height * (abs(self._cos) * self.HALF_WIDTH + abs(self._sin) * self.HALF_HEIGHT)
        reach_y = head.half_height * (abs(self._sin) * self.HALF_WIDTH + abs(self._cos) * self.HALF_HEIGHT)
        # The part of the canvas that the sprite covers; never empty, since some of the head is visible.
        self._left, self._top = max(0, math.floor(head.x - reach_x)), max(0, math.floor(head.y - reach_y))
        right, bottom = math.ceil(head.x + reach_x), math.ceil(head.y + reach_y)
        self._size = min(right, canvas_size[0]) - self._left, min(bottom, canvas_size[1]) - self._top
        # Samples per pixel: the smaller the head, the more its few pixels have to be averaged from.
        height = 2 * head.half_height
        self._samples = 6 if height < 20 else 4 if height < 55 else 2 if height < 120 else 1
        self._unit = head.half_height * self._samples
        size = self._size[0] * self._samples, self._size[1] * self._samples
        self._color, self._alpha = Image.new("RGB", size), Image.new("L", size)
        self._draw_color, self._draw_alpha = ImageDraw.Draw(self._color), ImageDraw.Draw(self._alpha)
        self._axes = np.array([[self._cos, self._sin], [-self._sin, self._cos]]) * self._unit
        self._origin = np.array([head.x - self._left, head.y - self._top]) * self._samples

    def fill(self, color: Color) -> None:
        """Give all of the sprite a color, which the edges of the opaque part blend with."""
        self._draw_color.rectangle((0, 0, *self._color.size), fill=color)

    def polygon(self, points: np.ndarray, color: Color) -> None:
        self._draw_color.polygon(self._samples_of(points), fill=color)

    def ellipse(self, u: float, v: float, half_width: float, half_height: float, color: Color) -> None:
        samples = self._samples_of_ellipse(_CIRCLE, u, v, half_width, half_height)
        self._draw_color.polygon(samples, fill=color)

    def stroke(self, points: np.ndarray, color: Color, thickness: float) -> None:
        self._draw_color.line(self._samples_of(points), fill=color, width=max(1, round(thickness * self._unit)))

    def reveal(self, points: np.ndarray) -> None:
        """Make a polygon of the sprite opaque."""
        self._draw_alpha.polygon(self._samples_of(points), fill=255)

    def reveal_ellipse(self, u: float, v: float, half_width: float, half_height: float) -> None:
        samples = self._samples_of_ellipse(LARGE_CIRCLE, u, v, half_width, half_height)
        self._draw_alpha.polygon(samples, fill=255)

    def paste(
        self, canvas: Image.Image, light: tuple[float, float], contrast: float, brightness: float, blur: int
    ) -> None:
        """Shade the sprite as an egg of the head's size, and blend it into ``canvas``.

        Args:
            light: where the light comes from, (x, y) of a vector whose third component points to the viewer with 1.
            contrast: 0: flat, 1: black where the light does not reach.
            brightness: factor of the whole sprite, at most 1.
            blur: pixels of a defocused head that show as one, 1: sharp.
        """
        color, alpha = self._color, self._alpha
        if self._samples * blur > 1:
            color, alpha = (layer.reduce(self._samples * blur) for layer in (color, alpha))
        shading = self._shading(color.size, light, contrast, brightness)
        color = ImageChops.multiply(color, Image.merge("RGB", [shading] * 3))
        if blur > 1:
            color, alpha = (layer.resize(self._size, Image.Resampling.BILINEAR) for layer in (color, alpha))
        canvas.paste(color, (self._left, self._top), alpha)

    def _shading(
        self, size: tuple[int, int], light: tuple[float, float], contrast: float, brightness: float
    ) -> Image.Image:
        """Brightness of the sprite, mode L of ``size``; computed on a coarse grid, since it is smooth."""
        steps = (np.arange(24) + 0.5) / 24
        x = (steps * self._size[0] * self._samples - self._origin[0]) / self._unit
        y = (steps[:, None] * self._size[1] * self._samples - self._origin[1]) / self._unit
        u, v = (self._cos * x + self._sin * y) / (1.25 * self.half_width), (self._cos * y - self._sin * x) / 1.25
        normal_x, normal_y = self._cos * u - self._sin * v, self._sin * u + self._cos * v
        normal_z = np.sqrt((1 - u * u - v * v).clip(0))
        facing = (normal_x * light[0] + normal_y * light[1] + normal_z) / math.hypot(*light, 1)
        levels = 255 * brightness * (1 - contrast * (1 - facing.clip(0)))
        half = (size[0] + 1) // 2, (size[1] + 1) // 2
        coarse = Image.fromarray(levels.astype(np.uint8)).resize(half, Image.Resampling.BILINEAR)
        return coarse.resize(size, Image.Resampling.NEAREST)

    def _samples_of(self, points: np.ndarray) -> list[float]:
        return (points @ self._axes + self._origin).ravel().tolist()

    def _samples_of_ellipse(
        self, circle: np.ndarray, u: float, v: float, half_width: float, half_height: float
    ) -> list[float]:
        # The same as _samples_of, written out in scalars: heads are made of ellipses, and this takes half the time.
        (ux, uy), (vx, vy) = self._axes.tolist()
        x, y = self._origin.tolist()
        shape = (half_width * ux, half_width * uy), (half_height * vx, half_height * vy)
        return (circle @ np.array(shape) + (u * ux + v * vx + x, u * uy + v * vy + y)).ravel().tolist()


def draw_head(sprite: Sprite, skin: Color, kind: str, rng: np.random.Generator) -> None:
    """A face, or for the kinds "blank", "scrambled" and "upside_down" a head whose features are not those of one."""
    q = sprite.half_width
    hair = between(_HAIR, rng) if rng.random() < 0.9 else random_color(rng)
    style = ("short", "short", "short", "short", "long", "long", "bald", "hat")[rng.integers(8)]
    outline = _outline(q, chin=rng.uniform(0.05, 0.28))

    sprite.fill(skin if style == "bald" else hair)
    sprite.reveal(outline)
    if style != "bald":
        volume = rng.uniform(1.03, 1.2)
        sprite.reveal_ellipse(0, -0.12, q * volume, 0.93 * volume)
    if style == "long":
        sprite.reveal_ellipse(0, 0.2, q * rng.uniform(1.12, 1.3), rng.uniform(0.85, 1.05))
    else:
        for side in (-1, 1):
            sprite.ellipse(side * q, 0, 0.1, 0.2, dim(skin, 0.85))
            sprite.reveal_ellipse(side * q, 0, 0.08, 0.18)
    sprite.polygon(outline, skin)

    yaw = rng.uniform(-0.3, 0.3) * q
    if kind != "blank":
        _draw_features(sprite, skin, hair, yaw, kind, rng)
    if style == "hat":
        brim = rng.uniform(-0.6, -0.45)
        color = random_color(rng)
        cap = np.concatenate([_outline(q * 1.08, 0)[24:48] * [1, 1.12], [[q * 1.1, brim], [-q * 1.1, brim]]])
        sprite.polygon(cap, color)
        sprite.reveal(cap)
        sprite.ellipse(yaw, brim, q * 1.1, 0.1, dim(color, 0.7))
        sprite.reveal_ellipse(yaw, brim, q * 1.1, 0.1)
    elif style != "bald":
        _draw_fringe(sprite, q, hair, yaw, rng)


def _draw_features(sprite: Sprite, skin: Color, hair: Color, yaw: float, kind: str, rng: np.random.Generator) -> None:
    q = sprite.half_width
    # Heights of (eyes, nose, mouth), and whether v grows upwards.
    rows = {"face": (-0.14, 0.24, 0.56), "upside_down": (0.36, 0.0, -0.3)}.get(kind)
    if rows is None:
        rows = [(0.5, -0.3, 0.05), (0.1, 0.6, -0.3), (-0.3, -0.45, -0.05)][rng.integers(3)]
    eyes, nose, mouth = (row + rng.normal(0, 0.025) for row in rows)
    down = -1 if kind == "upside_down" else 1
    apart = q * rng.uniform(0.42, 0.5)
    shadow, dark = dim(skin, rng.uniform(0.72, 0.88)), dim(skin, rng.uniform(0.35, 0.55))

    if rng.random() < 0.25:  # beard
        jaw = _outline(q, 0.15)[1:24]
        across = np.linspace(-1, 1, 11)
        upper = np.stack([across * q + yaw * (1 - across**2), mouth - (0.14 + 0.4 * across**4) * down], axis=1)
        sprite.polygon(np.concatenate([jaw, upper]), _mix(hair, skin, rng.uniform(0, 0.5)))
    eye_size = rng.uniform(0.85, 1.2)
    for side in (-1, 1):
        u = yaw + side * apart * (1 - 0.25 * side * yaw / q)
        v = eyes + (rng.normal(0, 0.03) if kind == "scrambled" else 0)
        sprite.ellipse(u, v - 0.02 * down, 0.23 * eye_size, 0.16 * eye_size, shadow)
        if rng.random() < 0.94:
            sprite.ellipse(u, v, 0.15 * eye_size, 0.085 * eye_size, (236, 232, 226))
            gaze = rng.uniform(-0.04, 0.04)
            sprite.ellipse(u + gaze, v, 0.075 * eye_size, 0.08 * eye_size, between(_IRIS, rng))
            sprite.ellipse(u + gaze, v, 0.038 * eye_size, 0.04 * eye_size, (12, 10, 10))
        lid = np.array([[-0.17, 0.02], [-0.09, -0.075], [0.05, -0.09], [0.17, 0.0]]) * eye_size * [side, down]
        sprite.stroke(lid + [u, v], dark, 0.045)
        brow = np.array([[-0.2, 0.03], [-0.02, -0.05], [0.2, 0.02]]) * [side, down]
        sprite.stroke(brow + [u, v - 0.24 * down], dim(hair, 0.8), rng.uniform(0.05, 0.1))
    tip = yaw * 1.5
    bridge = [[yaw - 0.05, eyes], [tip - 0.13, nose], [tip, nose + 0.06 * down], [yaw + 0.02, eyes + 0.1 * down]]
    sprite.polygon(np.array(bridge), shadow)
    sprite.ellipse(tip, nose, 0.15, 0.085, shadow)
    for side in (-1, 1):
        sprite.ellipse(tip + side * 0.075, nose + 0.04 * down, 0.04, 0.025, dark)
    _draw_mouth(sprite, yaw * 1.15, mouth, down, skin, rng)
    if rng.random() < 0.18:
        color = random_color(rng) if rng.random() < 0.3 else (24, 22, 24)
        tinted = rng.random() < 0.3
        for side in (-1, 1):
            u = yaw + side * apart
            if tinted:
                sprite.ellipse(u, eyes, 0.25, 0.2, (30, 28, 32))
            sprite.stroke(np.concatenate([_CIRCLE, _CIRCLE[:1]]) * (0.27, 0.22) + (u, eyes), color, 0.045)
        sprite.stroke(np.array([[yaw - 0.12, eyes], [yaw + 0.12, eyes]]), color, 0.045)


def _draw_mouth(sprite: Sprite, u: float, v: float, down: int, skin: Color, rng: np.random.Generator) -> None:
    lips = _mix(skin, (168, 44, 52), rng.uniform(0.25, 0.7))
    half_width, curve = rng.uniform(0.2, 0.32), rng.uniform(-0.02, 0.09) * down
    across = np.linspace(-1, 1, 9)[:, None]
    middle = np.concatenate([u + across * half_width, v - curve * across**2], axis=1)
    if rng.random() < 0.3:  # open
        height = rng.uniform(0.06, 0.16)
        sprite.ellipse(u, v, half_width * 0.9, height, lips)
        sprite.ellipse(u, v, half_width * 0.75, height * 0.65, (70, 18, 22))
        if rng.random() < 0.7:
            sprite.ellipse(u, v - 0.3 * height * down, half_width * 0.65, height * 0.3, (238, 232, 222))
        return
    thickness = np.concatenate([np.zeros((9, 1)), (1 - across**2) * rng.uniform(0.04, 0.08)], axis=1)
    sprite.polygon(np.concatenate([middle - thickness, (middle + thickness)[::-1]]), lips)
    sprite.stroke(middle, dim(lips, 0.5), 0.03)


def _draw_fringe(sprite: Sprite, q: float, hair: Color, yaw: float, rng: np.random.Generator) -> None:
    """Hair over the forehead, down to a curved hairline with a parting."""
    temple, top, parting = rng.uniform(-0.5, -0.15), rng.uniform(-0.85, -0.5), rng.uniform(-0.6, 0.6)
    crown = _outline(q * 1.02, 0)[24:48] * [1, 1.03]
    across = np.linspace(1, -1, 11)
    line = top + (temple - top) * np.abs((across - parting) / (1 + abs(parting))) ** rng.uniform(1.5, 4)
    hairline = np.stack([across * q * 0.99 + 0.2 * yaw * (1 - across**2), line], axis=1)
    sprite.polygon(np.concatenate([crown, hairline]), hair)
    for shade in rng.uniform(0.7, 1.35, size=5):  # strands
        start, end = rng.uniform(-0.8, 0.8) * q, rng.uniform(-1, 1) * q
        strand = np.array([[start, -1.05], [(start + end) / 2 + 0.1 * yaw, -0.9], [end, min(temple, top) - 0.08]])
        sprite.stroke(strand, dim(hair, shade), 0.03)


def draw_ball(sprite: Sprite, rng: np.random.Generator) -> None:
    """A round thing with the colors of skin, or any other, and maybe a pattern."""
    color = between(SKIN, rng) if rng.random() < 0.6 else random_color(rng)
    q = sprite.half_width
    sprite.fill(color)
    sprite.reveal_ellipse(0, 0, q, rng.uniform(0.8, 1) if rng.random() < 0.5 else q)
    for _ in range(rng.integers(0, 5)):
        u, v = rng.uniform(-0.7, 0.7, size=2)
        sprite.ellipse(u, v, rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.3), random_color(rng))


def _outline(half_width: float, chin: float) -> np.ndarray:
    """(48, 2) points of a head's contour, clockwise from the right ear; ``chin``: how much narrower the jaw is."""
    u, v = LARGE_CIRCLE.T
    return np.stack([half_width * u * (1 - chin * v.clip(0) ** 2), v], axis=1)


def between(palette: np.ndarray, rng: np.random.Generator) -> Color:
    """A color between two neighbors of ``palette``, a little off."""
    position = rng.uniform(0, len(palette) - 1)
    index = int(position)
    color = palette[index] + (palette[index + 1] - palette[index]) * (position - index) + rng.normal(0, 7, size=3)
    return _to_color(color.tolist())


def random_color(rng: np.random.Generator) -> Color:
    """Any color, the dull ones more often."""
    return _to_color((rng.uniform(10, 245) + rng.normal(0, 38, size=3)).tolist())


def dim(color: Color, factor: float) -> Color:
    return _to_color([value * factor for value in color])


def _mix(first: Color, second: Color, share: float) -> Color:
    return _to_color([a + (b - a) * share for a, b in zip(first, second)])


def _to_color(values: list[float]) -> Color:
    red, green, blue = (min(max(int(value), 0), 255) for value in values)
    return red, green, blue
