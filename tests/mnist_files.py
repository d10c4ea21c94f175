"""Made-up digits in the files of MNIST: a folder that `load_mnist` reads, with nothing of the real images in it."""

import gzip
import struct

import torch

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx(tensor):
    """The bytes of an IDX file that holds a uint8 tensor."""
    return struct.pack(f">BBBB{tensor.dim()}I", 0, 0, 8, tensor.dim(), *tensor.shape) + bytes(tensor.flatten().tolist())


def digits(split, n=20):
    """(images [N, 28, 28] uint8, labels [N] uint8): a bar of which height and place say the class."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(n, dtype=torch.uint8) % 10
    images = torch.randint(0, 60, (n, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[2 * label + 2 : 2 * label + 8, 8:20] += 180
    return images, labels


def write_mnist(folder, n=20, packed=False):
    """The four files, gzipped or not; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in NAMES.items():
        for name, tensor in zip(names, digits(split, n), strict=True):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(tensor)))
            else:
                (folder / name).write_bytes(idx(tensor))
    return folder
