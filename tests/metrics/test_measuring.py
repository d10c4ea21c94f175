"""One pass over a set: on any number of ranks the same features and statistics, and errors that reach every rank."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastgen._ranks import meet
from fastgen.data import ImageSetError, TensorImages
from fastgen.metrics import FileNetwork, Moments, load_classifier, load_features, measure

from .. import fresh
from .networks import Flat, script

CODE = """
import json, sys
import torch
torch.set_num_threads(1)
import numpy as np
from fastgen._ranks import meet, process_group
from fastgen.data import TensorImages
from fastgen.metrics import RankError, load_classifier, load_features, measure

folder, num, broken = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = np.load(f"{folder}/images.npz")

class Images(TensorImages):
    def read(self, start, stop):
        if start <= broken < stop:
            raise OSError(f"image {broken} cannot be read")
        return super().read(start, stop)

images = Images("mine", torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]))
ranks = meet()
with process_group(ranks, torch.device("cpu")):
    features = load_features("digits")
    try:
        classifier = load_classifier(features=features)
        found = measure(images, features, ranks, classifier=classifier, num=num, keep_rows=True, batch_size=4)
    except RankError as error:
        print(error)
        sys.exit(3)
print(json.dumps({"rows": found.rows is not None}))
if ranks.first:
    m = found.moments
    np.savez(f"{folder}/found{ranks.world_size}.npz", count=m.count, mean=m.mean, m2=m.m2, rows=found.rows, right=found.accuracy)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def on_ranks(n, *arguments):
    """What ``n`` processes with the variables of a launcher printed, and their statuses."""
    port = free_port()

    def start(rank):
        variables = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return fresh.run(
            CODE, *map(str, arguments), check=False, **{name: str(value) for name, value in variables.items()}
        )

    with ThreadPoolExecutor(n) as threads:
        return list(threads.map(start, range(n)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 1, 28, 28), generator=generator, dtype=torch.uint8)
    np.savez(folder / "images.npz", images=images, labels=torch.arange(50) % 10)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("num", [50, 9])
def test_any_number_of_ranks_measures_the_same(folder, num):
    """9 images are 3 batches: of 5 ranks two have nothing to do."""
    for n in (1, 2, 3, 5):
        ended = on_ranks(n, folder, num, -1)
        assert [result.returncode for result in ended] == [0] * n, ended
        assert [json.loads(result.stdout)["rows"] for result in ended] == [True] + [False] * (n - 1)
    one = np.load(folder / "found1.npz")
    assert one["count"] == num and one["rows"].shape == (num, 576)
    for n in (2, 3, 5):
        found = np.load(folder / f"found{n}.npz")
        assert found["count"] == num and found["right"].tolist() == one["right"].tolist()
        assert np.array_equal(found["rows"], one["rows"])  # bit for bit
        for name in ("mean", "m2"):
            np.testing.assert_allclose(found[name], one[name], rtol=1e-10, atol=1e-12 * np.abs(one[name]).max())


def test_what_one_rank_meets_all_raise(folder):
    ended = on_ranks(3, folder, 50, 30)  # of 13 batches the second rank has those of 16 to 31
    assert [result.returncode for result in ended] == [3] * 3, ended
    assert {result.stdout for result in ended} == {"rank 1: image 30 cannot be read\n"}


def pixels(n=20):
    return torch.randint(0, 256, (n, 1, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_one_process_measures_what_the_network_says(batch_size):
    features = load_features("digits")
    labels = torch.arange(20) % 10
    images = TensorImages("mine", pixels(), labels)
    found = measure(
        images, features, meet(), classifier=load_classifier(), num=15, keep_rows=True, batch_size=batch_size
    )
    with torch.no_grad():
        expected = features(pixels()[:15])
        right = int((load_classifier()(pixels()[:15]).argmax(1) == labels[:15]).sum())
    torch.testing.assert_close(found.rows, expected, rtol=1e-4, atol=1e-5)
    whole = Moments(576)
    whole.update(found.rows)
    torch.testing.assert_close(found.moments.m2, whole.m2, rtol=1e-10, atol=1e-10)
    assert found.accuracy == (right, 15)


def test_only_what_is_asked_for_is_kept():
    found = measure(TensorImages("mine", pixels()), load_features("digits"), meet(), classifier=load_classifier())
    assert found.rows is None and found.accuracy is None and found.moments.count == 20
    found.moments.merge(found.moments)  # a tensor like any other
    assert found.moments.count == 40


def test_more_images_than_there_are():
    for num in (0, 21):
        with pytest.raises(ValueError, match=f"num must be at least 1 and at most the 20 of mine, got {num}"):
            measure(TensorImages("mine", pixels()), load_features("digits"), meet(), num=num)


def test_features_that_are_not_finite_are_named_by_their_image(tmp_path):
    network = FileNetwork(script(tmp_path / "net.pt", Flat(torch.nn.LayerNorm(784, eps=0.0, elementwise_affine=False))))
    images = pixels()
    images[13] = 7  # constant: 0 / 0
    with pytest.raises(FloatingPointError, match="mine: the features of image 13 are not finite"):
        measure(TensorImages("mine", images), network, meet(), batch_size=6)


def test_an_error_of_the_set_is_its_own_where_there_is_one_process():
    class Broken(TensorImages):
        def read(self, start, stop):
            raise ImageSetError("x.png: damaged")

    with pytest.raises(ImageSetError, match=r"x\.png: damaged"):
        measure(Broken("mine", pixels()), load_features("digits"), meet())


def test_the_layout_in_memory_changes_nothing():
    last = pixels().view(20, 28, 28, 1).permute(0, 3, 1, 2)  # contiguous to torch, with the strides of channels-last
    assert last.stride() != pixels().stride() and last.is_contiguous()
    rows = [
        measure(TensorImages("mine", images), load_features("digits"), meet(), keep_rows=True).rows
        for images in (pixels(), last)
    ]
    assert torch.equal(*rows)
