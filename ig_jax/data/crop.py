"""Pixels of an encoded image: decoding and the centre crop of published preprocessing, byte for byte.

Pillow's filters are part of the definition. EXIF orientation and colour profiles are ignored, as published code does.
Source: openai/guided-diffusion guided_diffusion/image_datasets.py; the same in facebookresearch/DiT, willisma/SiT,
sihyun-yu/REPA, NVlabs/edm2 ("center-crop-dhariwal") and hustvl/LightningDiT.
"""

import io

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size x size pixels of an image whose shorter side has been scaled to `size`."""
    while min(image.size) >= 2 * size:  # halving first: the cubic filter alone would see every pixel of a large image
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode(data: bytes, size: int, channels: int = 3) -> np.ndarray:
    """The centre crop of an encoded image, uint8 (size, size, channels) with 1 or 3 channels.

    Raises: ValueError saying why the image cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(centre_crop(image.convert(MODES[channels]), size))
    except Exception as error:  # of many types; Pillow's decoders trust their input
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(reason if data else "empty") from error
    return pixels.reshape(size, size, channels)
