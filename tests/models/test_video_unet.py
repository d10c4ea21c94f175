"""`VideoUNet`: frame by frame the `UNet` that it starts as, against plain torch, in time, and as a module."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.models import FrameInterpolationUNet, UNet, VideoUNet, known_frames
from fastgen.models.video_unet import FrameResample
from fastgen.nn import Conv2d, GroupNorm, PlainGroupNorm

from ..modules import max_difference, randomize

SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "num_groups": 4}
IMAGE = {
    "bias_conv": {"in_channels": 3},
    "scale_shift_updown": {
        "in_channels": 1,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "num_classes": 5,
        "null_class": True,
        "num_head_channels": 8,
    },
    "learned_sigma": {"in_channels": 2, "learn_sigma": True, "num_heads": 2, "attention_resolutions": [1, 2]},
    "no_conv": {"conv_resample": False, "channel_mult": [1, 1, 2]},
}
TIME = {
    "bias_conv": {},
    "scale_shift_updown": {"temporal_resolutions": [1], "fps_conditioning": True},
    "learned_sigma": {"causal": True, "temporal_kernel_size": 5},
    "no_conv": {"temporal_resolutions": [1, 2]},
}


def build(variant, norm=GroupNorm, cls=VideoUNet):
    return randomize(cls(**{**SMALL, **IMAGE[variant], **TIME[variant]}, norm=norm)).eval()


def image_model(variant, **options):
    return randomize(UNet(**{**SMALL, **IMAGE[variant], **options})).eval()


def arguments(model, dtype=torch.float32, frames=4, n=2):
    """As keywords."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, model.in_channels, frames, 8, 12, generator=generator, dtype=torch.float64).to(dtype)
    given = {"x": x, "timesteps": torch.tensor([3.0, 700.0], dtype=dtype)[:n]}
    if model.num_classes is not None:
        given["y"] = torch.arange(n)
    if isinstance(model, VideoUNet) and model.fps_embedding is not None:
        given["fps"] = torch.tensor([8.0, 24.0], dtype=dtype)[:n]
    return given


def frame_by_frame(model, given):
    """The image model ``model`` on each frame."""
    rest = {name: value for name, value in given.items() if name in ("timesteps", "y")}
    return torch.stack([model(frame, **rest) for frame in given["x"].unbind(2)], 2)


@pytest.mark.parametrize("variant", IMAGE)
def test_starts_as_the_image_model(variant):
    """Frame by frame to rounding; where the frames are resampled, on a video that stands still."""
    unet = image_model(variant).double()
    model = VideoUNet.from_image_model(unet, **TIME[variant])
    assert not model.training and next(model.parameters()).dtype == torch.float64
    given = arguments(model, torch.float64)
    if model.temporal_downsampling > 1:
        given["x"] = given["x"][:, :, :1].expand(-1, -1, 4, -1, -1).clone()
    expected = frame_by_frame(unet, given)
    assert expected.std() > 0.1 and max_difference(model(**given), expected) <= 1e-12
    one = {**given, "x": given["x"][:, :, :1]}
    if model.temporal_downsampling == 1:
        assert max_difference(model(**one), expected[:, :, :1]) <= 1e-12
    frames = {**arguments(model, torch.float64), "enable_time": False}
    assert max_difference(model(**frames), frame_by_frame(unet, frames)) <= 1e-12
    still = {**given, "x": given["x"][:, :, 0]}
    assert max_difference(model(**still), expected[:, :, 0]) <= 1e-12


@pytest.mark.parametrize("variant", IMAGE)
def test_images_and_frames_apart(variant):
    """Whatever the layers along the frames have learnt; and what they have learnt shows where time is enabled."""
    model = build(variant).double()
    given = arguments(model, torch.float64)
    apart = model(**given, enable_time=False)
    for i in range(4):
        assert max_difference(model(**{**given, "x": given["x"][:, :, i]}), apart[:, :, i]) <= 1e-12
    assert max_difference(model(**given), apart) > 1e-2
    odd = {**given, "x": given["x"][:, :, :3]}
    assert max_difference(model(**odd, enable_time=False), apart[:, :, :3]) <= 1e-12


@pytest.mark.parametrize("variant", IMAGE)
def test_is_plain_torch(variant):
    fused, plain = build(variant), build(variant, PlainGroupNorm)
    given = arguments(fused)
    expected = plain(**given)
    assert expected.std() > 0.1 and expected.shape == (2, fused.out_channels, 4, 8, 12)
    result = fused(**given)
    assert max_difference(result, expected) <= 2e-5 and result.is_contiguous()
    given["x"] = given["x"].contiguous(memory_format=torch.channels_last_3d)
    result = fused(**given)
    assert max_difference(result, expected) <= 2e-5
    if fused.in_channels > 1:  # the strides of one channel say either
        assert result.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():  # Winograd's convolutions
        exact = plain.double()(**arguments(fused, torch.float64))
        assert (fused(**given) - exact).norm() <= 2e-5 * exact.norm()
    assert not any(isinstance(module, Conv2d) for module in plain.modules())


@pytest.mark.parametrize("variant", IMAGE)
def test_gradients_are_those_of_plain_torch(variant):
    grads = []
    for norm in (GroupNorm, PlainGroupNorm):
        model = build(variant, norm).double()
        given = arguments(
            model, torch.float64, frames=8
        )  # two at least at every level: to one alone attention says nothing
        leaves = [given["x"].requires_grad_(), *model.parameters()]
        grads.append(torch.autograd.grad(model(**given).square().mean(), leaves))
    assert all(grad.abs().max() > 0 for grad in grads[0])
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-10


def test_a_video_depends_on_itself_alone():
    """No frame looks into the next video of the batch."""
    model = build("scale_shift_updown").double()
    given = arguments(model, torch.float64)
    together = model(**given)
    alone = model(**{name: value[1:] for name, value in given.items()})
    assert max_difference(together[1:], alone) <= 1e-12


def test_how_far_a_frame_sees():
    """To all others by attention, and not ahead where that is causal."""
    for options, before, after in (({"attention_resolutions": [1]}, True, True), ({"causal": True}, True, False)):
        model = randomize(VideoUNet(in_channels=1, **{**SMALL, **options}, temporal_kernel_size=1)).double().eval()
        given = arguments(model, torch.float64, frames=5)
        expected = model(**given)
        given["x"] = given["x"].clone()
        given["x"][:, :, 2] += 1
        changed = (model(**given) - expected).abs().amax((0, 1, 3, 4)) > 1e-9
        assert changed.tolist() == [after, after, True, before, before]


def test_the_frames_are_halved_and_doubled():
    model = build("no_conv")
    assert model.temporal_downsampling == 4 and model.downsampling == 4
    lengths = []
    for stage in (*model.input_blocks, model.middle_block, *model.output_blocks):
        stage.register_forward_hook(lambda module, inputs, output: lengths.append(len(output)))
    model(**arguments(model, frames=4, n=1))
    assert lengths == [4, 4, 2, 2, 1, 1, 1, 1, 2, 2, 4, 4, 4]
    frames = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    halved = FrameResample("down")(frames, 2)
    assert max_difference(halved, frames.unflatten(0, (4, 2)).mean(1)) <= 1e-6
    assert torch.equal(FrameResample("up")(halved, 2).unflatten(0, (4, 2)), torch.stack([halved, halved], 1))
    assert FrameResample("up")(frames) is FrameResample("down")(frames) is frames


def test_frames_per_second():
    model = build("scale_shift_updown")
    given = arguments(model)
    base = model(**given)
    assert max_difference(base, model(**{**given, "fps": given["fps"] + 3})) > 1e-3
    scalar = model(**{**given, "fps": torch.tensor(8.0)})
    assert torch.equal(scalar, model(**{**given, "fps": torch.tensor([8.0, 8.0])}))
    fresh = VideoUNet.from_image_model(image_model("bias_conv"), fps_conditioning=True)
    given = arguments(fresh)
    assert torch.equal(fresh(**given), fresh(**{**given, "fps": None}))


def test_known_frames():
    frames = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    known = known_frames(frames, 5)
    assert known.shape == (2, 4, 16, 5, 6) and known.dtype == torch.bfloat16
    assert torch.equal(known[:, :3, ::5], frames)
    assert known[:, 3].amax((0, 2, 3)).tolist() == known[:, 3].amin((0, 2, 3)).tolist() == 3 * [1, 0, 0, 0, 0] + [1]
    assert not known[:, :3, known[0, 3, :, 0, 0] == 0].any()
    assert torch.equal(known_frames(frames, 1)[:, :3], frames)
    with pytest.raises(ValueError, match=r"frames must be \[N, C, K, H, W\], got shape \(2, 3, 5, 6\)"):
        known_frames(frames[:, :, 0], 5)
    with pytest.raises(ValueError, match=r"stride must be positive, got 0"):
        known_frames(frames, 0)


def test_frame_interpolation():
    model = build("bias_conv", cls=FrameInterpolationUNet)
    given = arguments(model)
    known = known_frames(given["x"][:, :, ::3], 3)
    plain = build("bias_conv", PlainGroupNorm, FrameInterpolationUNet)
    result = model(**given, known=known)
    assert result.shape == (2, 3, 4, 8, 12) and max_difference(result, plain(**given, known=known)) <= 2e-5
    assert max_difference(result, model(**given, known=torch.zeros_like(known))) > 1e-2
    with pytest.raises(ValueError, match=r"known must be \[2, 4, 4, 8, 12\], got shape \(2, 3, 4, 8, 12\) for x of"):
        model(**given, known=known[:, :3])


def test_frame_interpolation_starts_as_the_video_model():
    video = build("scale_shift_updown").double()
    model = FrameInterpolationUNet.from_image_model(video)
    given = arguments(video, torch.float64)
    known = known_frames(given["x"], 1)
    assert max_difference(model(**given, known=known), video(**given)) <= 1e-12
    weight = model.input_blocks[0][0].weight
    assert weight.shape[1] == 3 and not weight[:, 1:].any()


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous", "index") and result.dim() > 3:
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies(dtype):
    """None of features where the channels of the video are innermost; else one of the video, and one of the result."""
    model = build("bias_conv").to(dtype)
    given = arguments(model, dtype)
    for layout, expected in ((torch.channels_last_3d, 0), (torch.contiguous_format, 2)):
        x = given["x"].contiguous(memory_format=layout)
        with torch.no_grad(), Copies() as copies:
            model(x, given["timesteps"])
        assert len(copies.names) == expected, copies.names


def test_starts_at_zero():
    model = VideoUNet(1, **SMALL)
    given = arguments(model)
    assert torch.equal(model(**given), torch.zeros_like(given["x"]))


def test_an_empty_batch():
    model = build("learned_sigma")
    empty = {name: value[:0] for name, value in arguments(model).items()}
    assert model(**empty).shape == (0, 4, 4, 8, 12)
    assert model(**{**empty, "x": empty["x"][:, :, 0]}).shape == (0, 4, 8, 12)


def test_training_with_dropout():
    model = VideoUNet.from_image_model(image_model("bias_conv", dropout=0.5))
    given = arguments(model)
    assert torch.equal(model(**given), model(**given))
    model.train()
    assert not torch.equal(model(**given), model(**given))


def test_low_precision_runs_and_is_close():
    model = build("learned_sigma")
    given = arguments(model)
    expected = model(**given)
    given["x"] = given["x"].bfloat16()
    result = model.bfloat16()(**given)
    assert result.dtype == torch.bfloat16
    assert (result - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("cls", [VideoUNet, FrameInterpolationUNet])
@pytest.mark.parametrize("variant", IMAGE)
def test_config_state_dict_files_pickle_deepcopy(variant, cls, tmp_path):
    model = build(variant, cls=cls)
    given = arguments(model)
    if cls is FrameInterpolationUNet:
        given["known"] = known_frames(given["x"], 1)
    expected = model(**given)
    twin = cls.from_config(model.config).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    model.save(tmp_path / "unet.safetensors")
    loaded = cls.load(tmp_path / "unet.safetensors")
    told = {**SMALL, **IMAGE[variant], **TIME[variant], "num_heads": model.config["num_heads"]}
    untold = ("num_heads", "num_head_channels", "num_groups", "num_classes", "null_class", *TIME[variant])
    found = cls.from_state_dict(model.state_dict(), **{name: told[name] for name in untold if name in told})
    assert found.config == model.config
    for other in (twin, loaded, found, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(**given), expected)


def test_meta_construction_and_forward():
    with torch.device("meta"):
        model = VideoUNet(3, 64, temporal_resolutions=[1], fps_conditioning=True)
        output = model(torch.empty(2, 3, 4, 32, 32), torch.zeros(2), fps=torch.zeros(2))
    assert all(p.is_meta for p in model.parameters())
    assert output.is_meta and output.shape == (2, 3, 4, 32, 32)


def test_print():
    text = repr(build("scale_shift_updown"))
    for part in ("VideoResBlock(", "VideoAttention(", "FrameConv(", "TemporalAttention(", "FrameResample('down')"):
        assert part in text


def test_bad_arguments():
    for options, message in (
        ({"temporal_resolutions": [2]}, r"temporal_resolutions must be downsampling factors among \[1\], got \[2\]"),
        ({"temporal_kernel_size": 2}, r"kernel_size must be odd, got 2"),
        ({"num_groups": 5}, r"VideoUNet: num_groups must divide every width"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoUNet(**{**SMALL, **options})
    with pytest.raises(ValueError, match=r"VideoUNet.from_config: unknown keys \['depth'\]"):
        VideoUNet.from_image_model(image_model("bias_conv"), depth=3)
    with pytest.raises(ValueError, match=r"FrameInterpolationUNet.from_config: unknown .*'temporal_kernel_size'"):
        FrameInterpolationUNet.from_config({"depth": 3})


def test_bad_inputs():
    model = build("scale_shift_updown")
    given = arguments(model)
    x = given["x"]
    wanted = r"VideoUNet: x must be \[N, 1, F, H, W\] or \[N, 1, H, W\], got shape"
    for change, message in (
        ({"x": x[:, 0, 0]}, rf"{wanted} \(2, 8, 12\)"),
        ({"x": x.expand(2, 2, 4, 8, 12)}, rf"{wanted} \(2, 2, 4, 8, 12\)"),
        ({"x": x[..., :7]}, r"height and width of x must be divisible by 2, got shape \(2, 1, 4, 8, 7\)"),
        ({"x": x[:, :, :3]}, r"the frames of x must be divisible by 2, got shape \(2, 1, 3, 8, 12\)"),
        ({"x": x[:, :, :0]}, r"the frames of x must be divisible by 2, got shape \(2, 1, 0, 8, 12\)"),
        ({"timesteps": torch.zeros(3)}, r"timesteps must be \[N\] = \[2\] or a scalar, got shape \(3,\)"),
        ({"fps": torch.zeros(3)}, r"fps must be \[N\] = \[2\] or a scalar, got shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**given, **change})
    plain = build("bias_conv")
    with pytest.raises(ValueError, match=r"the model has no fps_conditioning, got fps"):
        plain(**arguments(plain), fps=torch.tensor(8.0))
