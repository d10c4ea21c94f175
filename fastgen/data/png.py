"""PNG files, which need no more than zlib: grey levels or RGB, 8 bits."""

import struct
import zlib

import numpy as np


def png(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 1] grey or [H, W, 3] RGB uint8 as a PNG file (RFC 2083): signature, header, one block of data, end."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"png: pixels must be uint8 [H, W], [H, W, 1] or [H, W, 3], got {pixels.dtype} {pixels.shape}")
    height, width = pixels.shape[:2]
    colour = 2 if pixels.shape[2:] == (3,) else 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.concatenate([np.zeros((height, 1), dtype=np.uint8), pixels.reshape(height, -1)], axis=1)  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)  # 8 bits, not interlaced
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)
