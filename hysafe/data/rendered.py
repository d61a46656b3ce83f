"""Pictures of text, rendered for training: so that a tower knows a screenshot when it sees one.

The tower is not meant to read them (OCR does); it learns that their message lies in their words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["render_text_pictures"]

# Rendered large and shrunk, as a real screenshot would be.
CANVAS = 256


def render_text_pictures(texts: Sequence[str], size: int, *, seed: int) -> np.ndarray:
    """One picture per text: uint8 [len(texts), 3, size, size]; the same for the same seed."""
    rng = random.Random(seed)
    return np.stack([_render(t, size, rng) for t in texts])


def _render(text: str, size: int, rng: random.Random) -> np.ndarray:
    dark = rng.random() < 0.35
    back = tuple(rng.randint(0, 90) if dark else rng.randint(150, 255) for _ in range(3))
    ink = tuple(rng.randint(170, 255) if dark else rng.randint(0, 110) for _ in range(3))
    image = Image.new("RGB", (CANVAS, CANVAS), back)
    draw = ImageDraw.Draw(image)
    style = rng.choice(("page", "bubbles", "poster", "meme"))
    height = rng.choice((11, 13, 16)) if style == "page" else rng.choice((18, 24, 32))
    font = ImageFont.load_default(height)
    words = text.split()
    width = max(6, int(CANVAS / (height * 0.55)))
    lines = _wrap(words, width) * (3 if style == "page" else 1)
    if style == "bubbles":
        y = rng.randint(4, 40)
        for i, line in enumerate(lines[:7]):
            x = 8 if i % 2 == 0 else 40
            bubble = tuple(rng.randint(120, 250) for _ in range(3))
            draw.rounded_rectangle((x, y, x + 200, y + height + 12), 9, fill=bubble)
            draw.text((x + 8, y + 5), line, fill=(20, 20, 20), font=font)
            y += height + 20
    elif style == "meme":
        noise = np.array(image, dtype=np.int16)
        patch = np.random.default_rng(rng.randint(0, 2**31)).normal(0, 40, (16, 16, 3))
        big = Image.fromarray((patch + 128).clip(0, 255).astype(np.uint8)).resize((CANVAS, CANVAS))
        image = Image.fromarray(((noise + np.array(big)) // 2).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for i, line in enumerate(lines[:3]):
            draw.text((10, 8 + i * (height + 4)), line, fill="white", font=font,
                      stroke_width=2, stroke_fill="black")  # fmt: skip
    else:
        if style == "poster":
            accent = tuple(rng.randint(0, 255) for _ in range(3))
            draw.rectangle((0, 0, CANVAS, rng.randint(10, 60)), fill=accent)
        y = rng.randint(4, 70)
        for line in lines:
            draw.text((rng.randint(4, 14), y), line, fill=ink, font=font)
            y += int(height * 1.4)
            if y > CANVAS:
                break
    small = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(small).transpose(2, 0, 1)


def _wrap(words: Sequence[str], width: int) -> list[str]:
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) + 1 > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines
