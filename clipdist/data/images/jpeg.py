"""The pixels of a JPEG at a fraction of their size.

libjpeg-turbo, through simplejpeg, decodes at 1/2, 1/4 and 1/8 for less than the full price. At other eighths it leaves
its vector code and is slower than a full decode.
"""

import numpy as np
import simplejpeg

from clipdist.data.images.geometry import reduced
from clipdist.data.images.header import JpegHeader


def decode_reduced(data: bytes, header: JpegHeader, reduction: int) -> np.ndarray | None:
    """Pixels as stored, uint8 [ceil(height / reduction), ceil(width / reduction), 3]; reduction 1, 2, 4 or 8.

    None for what libjpeg-turbo does not turn into RGB (CMYK, more than 8 bits), and for whatever it warns of:
    truncated files, which it would fill with grey, and harmless oddities alike.
    """
    if header.components not in (1, 3) or header.bits != 8:
        return None
    height, width = reduced(header.height, reduction), reduced(header.width, reduction)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None
