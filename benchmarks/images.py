"""JPEGs to measure with: crops of photographs, resized and encoded again."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.images.decode import IMAGE_SUFFIXES

QUALITY = 90


def photographs(folder: Path | None) -> list[Image.Image]:
    """Those of a folder; else scikit-image's; where that is not installed, noise with the spectrum of photographs."""
    if folder is not None:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        return [Image.open(path).convert("RGB") for path in found[:500]]
    try:
        from skimage import data as samples

        names = ("astronaut", "chelsea", "coffee", "rocket", "gravel", "grass", "retina", "hubble_deep_field")
        return [Image.fromarray(getattr(samples, name)()).convert("RGB") for name in names]
    except ImportError:
        random, frequency = np.random.default_rng(0), np.hypot(*np.meshgrid(*[np.fft.fftfreq(1024)] * 2))
        spectrum = 1 / np.maximum(frequency, 1 / 1024)  # amplitude falls as 1 / f (Field 1987)
        noise = np.fft.fft2(random.standard_normal((4, 1024, 1024, 3)), axes=(1, 2)) * spectrum[..., None]
        pixels = np.fft.ifft2(noise, axes=(1, 2)).real
        pixels = 128 + 50 * pixels / pixels.std()
        return [Image.fromarray(each) for each in pixels.clip(0, 255).astype(np.uint8)]


def make(folder: Path, sources: list[Image.Image], size: tuple[int, int], count: int) -> list[Path]:
    """``count`` distinct JPEGs of ``size`` (width, height): crops of the sources, mirrored or not, resized."""
    width, height = size
    folder.mkdir(parents=True)

    def one(index: int) -> Path:
        random, source = np.random.default_rng([index, width]), sources[index % len(sources)]
        scale = min(source.width / width, source.height / height) * random.uniform(0.6, 1)
        left, top = random.uniform(0, source.width - scale * width), random.uniform(0, source.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        image = source.resize(size, Image.Resampling.LANCZOS, box=box)
        path = folder / f"{index:06}.jpg"
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image
        image.save(path, quality=QUALITY)
        return path

    for source in sources:
        source.load()  # not in the threads: files are read lazily
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, range(count)))
