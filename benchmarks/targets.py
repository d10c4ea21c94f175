"""The targets fastgen sets itself on 2 CPU threads, as data: what is asked, and how it is read off a result document.

A target is met, missed, or not measured; a red case counts as missed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .results import Row, speedup
from .timing import geometric_mean

THREADS = 2  # the targets are stated for this many
NAIVE = "naive, extrapolated"  # a pass of the full network for each pixel, of which one is timed


@dataclass(frozen=True)
class Figure:
    """A measured figure: its value (None: not measured) and the case or count it comes from."""

    value: float | None
    detail: str = ""


@dataclass(frozen=True)
class Target:
    """``measure`` reads the figure; it must be at least ``bound``, or at most where ``at_most``. ``amx``: asked of machines with
    matrix tiles alone (True), of those without (False), or of all."""

    text: str
    bound: float
    measure: Callable[[Sequence[Row]], Figure]
    at_most: bool = False
    unit: str = "x"
    amx: bool | None = None


@dataclass(frozen=True)
class Verdict:
    target: Target
    figure: Figure
    verdict: str  # "met", "missed" or "not measured"


def select(rows: Sequence[Row], **fields: str) -> list[Row]:
    """Rows whose fields have these values."""
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def _mean_speedup(baseline: str, **fields: str) -> Callable[[Sequence[Row]], Figure]:
    def measure(rows: Sequence[Row]) -> Figure:
        chosen = select(rows, **fields)
        values = [value for row in chosen if (value := speedup(row, baseline)) is not None]
        if not values:
            return Figure(None)
        return Figure(geometric_mean(values), f"{len(values)} of {len(chosen)} rows, lowest {min(values):.2f}")

    return measure


def _lowest(baseline: str, **fields: str) -> Callable[[Sequence[Row]], Figure]:
    def measure(rows: Sequence[Row]) -> Figure:
        found = [(v, row["id"]) for row in select(rows, **fields) if (v := speedup(row, baseline)) is not None]
        return Figure(*min(found)) if found else Figure(None)

    return measure


def _one(quantity: Callable[[Row], float | None], **fields: str) -> Callable[[Sequence[Row]], Figure]:
    """The worst (largest) or only value of ``quantity`` over the rows with these fields."""

    def measure(rows: Sequence[Row]) -> Figure:
        values = [(value, row["id"]) for row in select(rows, **fields) if (value := quantity(row)) is not None]
        return Figure(*max(values)) if values else Figure(None)

    return measure


def _times_of(baseline: str) -> Callable[[Row], float | None]:
    """How many times the time of ``baseline`` fastgen takes."""
    return lambda row: None if (value := speedup(row, baseline)) is None else 1 / value


def _over(baseline: str) -> Callable[[Row], float | None]:
    return lambda row: speedup(row, baseline)


def _microseconds(row: Row) -> float | None:
    times = row["times"].get("fastgen")
    return None if times is None else times[0] * 1e6


_AS_USED, _SEEDS = "as used", "with seeds"
_SMALL, _LARGE, _FOUR_MILLION = "1x4x64x64", "16x3x256x256", "16x4x256x256"

TARGETS: tuple[Target, ...] = (
    Target("group_norm + SiLU, inference, geometric mean over eager", 2.0, _mean_speedup("eager", family="group_norm", mode="silu")),
    Target("group_norm + SiLU, inference, geometric mean over compile", 2.0, _mean_speedup("compile", family="group_norm", mode="silu")),
    Target("with scale and shift, geometric mean over eager", 3.0, _mean_speedup("eager", family="group_norm", mode="scale_shift")),
    Target("with scale and shift, geometric mean over compile", 2.0, _mean_speedup("compile", family="group_norm", mode="scale_shift")),
    Target("forward + backward, geometric mean over eager", 1.7, _mean_speedup("eager", family="group_norm", mode="backward")),
    Target("no group_norm row slower than the better baseline (lowest row)", 0.95, _lowest("fastest", family="group_norm")),
    Target("group_norm + SiLU at 2x320x64x64 fp32 within 3x of a copy (worse layout)", 3.0, _one(_over("floor"), family="group_norm", mode="silu", shape="2x320x64x64", dtype="fp32"), at_most=True),
    Target("norm + SiLU + 3x3 convolution + residual, fp32, geometric mean over the fastest baseline", 2.7, _mean_speedup("fastest", family="conv2d", dtype="fp32")),
    Target("the same in bf16 (a machine without AMX)", 1.5, _mean_speedup("fastest", family="conv2d", dtype="bf16"), amx=False),
    Target("the same in bf16 (a machine with AMX)", 1.2, _mean_speedup("fastest", family="conv2d", dtype="bf16"), amx=True),
    Target("no conv2d row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="conv2d")),
    Target("nearest upsampling + 3x3 convolution, fp32, geometric mean over the fastest baseline", 1.8, _mean_speedup("fastest", family="upsample_conv2d", dtype="fp32")),
    Target("masked convolution 3x3 B, inference, fp32, geometric mean over eager", 1.5, _mean_speedup("eager", family="masked_conv2d", mode="3x3 B, inference", dtype="fp32")),
    Target("masked convolution 7x7 A, inference, fp32, geometric mean over eager", 1.7, _mean_speedup("eager", family="masked_conv2d", mode="7x7 A, inference", dtype="fp32")),
    Target("masked convolution 3x3 B, forward and backward, fp32, geometric mean over eager", 1.4, _mean_speedup("eager", family="masked_conv2d", mode="3x3 B, training", dtype="fp32")),
    Target("masked convolution 7x7 A, forward and backward, fp32, geometric mean over eager", 1.4, _mean_speedup("eager", family="masked_conv2d", mode="7x7 A, training", dtype="fp32")),
    Target("attention, d = 40 to 160, fp32, geometric mean over eager", 1.1, _mean_speedup("eager", family="attention", mode="self", dtype="fp32")),
    Target("attention, d = 40 to 160, bf16 (a machine without AMX), geometric mean over eager", 1.8, _mean_speedup("eager", family="attention", mode="self", dtype="bf16"), amx=False),
    Target("attention, d = 40 to 160, bf16 (a machine with AMX), geometric mean over eager", 1.2, _mean_speedup("eager", family="attention", mode="self", dtype="bf16"), amx=True),
    Target("attention, d = 8, geometric mean over eager", 3.0, _mean_speedup("eager", family="attention", mode="d8")),
    Target("attention, 77 keys, geometric mean over eager", 1.6, _mean_speedup("eager", family="attention", mode="keys77")),
    Target("attention, forward and backward, geometric mean over eager", 1.3, _mean_speedup("eager", family="attention", mode="backward")),
    Target("geglu with its linear, inference, geometric mean over eager", 1.5, _mean_speedup("eager", family="geglu", mode="inference")),
    Target("no geglu row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="geglu")),
    Target("no linear_attention row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="linear_attention")),
    Target("no layer_norm row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="layer_norm")),
    Target("no rms_norm row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="rms_norm")),
    # counted in bytes that must move against those that eager torch moves: 2.3 to 3.7 and 2.9, of concat_elu 3.3 and 3
    Target("gated_activation, forward, geometric mean over eager", 2.0, _mean_speedup("eager", family="gated_activation", mode="forward")),
    Target("gated_activation, forward and backward, geometric mean over eager", 2.0, _mean_speedup("eager", family="gated_activation", mode="backward")),
    Target("concat_elu, forward, geometric mean over eager", 2.0, _mean_speedup("eager", family="concat_elu", mode="forward")),
    Target("concat_elu, forward and backward, geometric mean over eager", 2.0, _mean_speedup("eager", family="concat_elu", mode="backward")),
    Target("no gated_activation row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="gated_activation")),
    Target("no concat_elu row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="concat_elu")),
    Target("inverse of a MAF layer, D = 64, hidden 512, batch 256, over nflows", 150.0, _lowest("nflows", family="autoregressive_inverse", shape="256x64")),
    Target("the same with D = 784 (a pass of nflows timed, times 784)", 300.0, _lowest("nflows", family="autoregressive_inverse", shape="256x784")),
    Target("inverse of a MAF layer, D = 64, hidden 512, batch 256, over zuko", 50.0, _lowest("zuko", family="autoregressive_inverse", shape="256x64")),
    Target("inverse of a MAF layer, D = 64, hidden 512, batch 256, over flowjax", 5.0, _lowest("flowjax", family="autoregressive_inverse", shape="256x64")),
    Target("forward of a MADE, D = 64, hidden 512, batch 256, over nflows", 4.0, _lowest("nflows", family="masked_linear", mode="MADE", shape="256x64")),
    Target("no masked_linear row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="masked_linear")),
    # counted in accesses an element: normflows 13, FrEIA 17 and nflows 23, where 4 to 6 are needed
    Target("affine coupling, forward and log-det, over nflows (lower row)", 10.0, _lowest("nflows", family="affine_coupling", mode="nflows_forward")),
    Target("the same over its formula compiled", 3.0, _lowest("compile", family="affine_coupling", mode="nflows_forward")),
    Target("the same over normflows", 3.0, _lowest("normflows", family="affine_coupling", mode="normflows_forward")),
    Target("the same over FrEIA", 3.0, _lowest("FrEIA", family="affine_coupling", mode="FrEIA_forward")),
    Target("affine coupling of nflows, forward and log-det, within 2x of a copy (worst row)", 2.0, _one(_over("floor"), family="affine_coupling", mode="nflows_forward"), at_most=True),
    Target("the same of normflows", 2.0, _one(_over("floor"), family="affine_coupling", mode="normflows_forward"), at_most=True),
    Target("the same of FrEIA", 2.0, _one(_over("floor"), family="affine_coupling", mode="FrEIA_forward"), at_most=True),
    Target("affine coupling, forward and backward, over normflows (lower row)", 3.0, _lowest("normflows", family="affine_coupling", mode="normflows_backward")),
    Target("the same over FrEIA", 3.0, _lowest("FrEIA", family="affine_coupling", mode="FrEIA_backward")),
    Target("the same over nflows", 3.0, _lowest("nflows", family="affine_coupling", mode="nflows_backward")),
    # counted in bytes, 25 accesses an element against 577 and 681
    Target("rational-quadratic spline, K = 8, 262,144 elements, both ways, over nflows (lowest row)", 12.0, _lowest("nflows", family="rational_quadratic_spline", shape="4096x64", dtype="fp32")),
    Target("the same over zuko", 12.0, _lowest("zuko", family="rational_quadratic_spline", shape="4096x64", dtype="fp32")),
    Target("the same over zuko compiled", 3.0, _lowest("compile", family="rational_quadratic_spline", shape="4096x64", dtype="fp32")),
    Target("the same over flowjax", 5.0, _lowest("flowjax", family="rational_quadratic_spline", shape="4096x64", dtype="fp32")),
    # counted in bytes: an actnorm of two operations moves 4 accesses an element, of training 9; two halves under a normal 13
    Target("actnorm with its log-determinant, forward and backward, geometric mean over eager", 1.5, _mean_speedup("eager", family="actnorm", mode="backward")),
    Target("actnorm and 1x1 convolution with their log-determinant, forward and backward, geometric mean over eager", 1.5, _mean_speedup("eager", family="invertible_conv1x1", mode="backward")),
    Target("normal log-density, packed parameters, forward and backward, geometric mean over eager", 3.0, _mean_speedup("eager", family="gaussian_log_prob", mode="backward")),
    Target("no actnorm row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="actnorm")),
    Target("no invertible_conv1x1 row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="invertible_conv1x1")),
    Target("no squeeze row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="squeeze")),
    Target("no gaussian_log_prob row slower than the fastest baseline (lowest row)", 1.0, _lowest("fastest", family="gaussian_log_prob")),
    # counted in multiply-adds, the cached engine does 1/784 of a naive loop's of 28 x 28 pixels, and 1/1024 of 32 x 32
    Target("Gated PixelCNN of 10 layers of 128 channels, 28x28, batch 1, over the naive loop (extrapolated)", 300.0, _lowest(NAIVE, family="pixelcnn", mode="gated", how=_AS_USED, shape="1x1x28x28")),
    Target("the same at batch 16", 600.0, _lowest(NAIVE, family="pixelcnn", mode="gated", how=_AS_USED, shape="16x1x28x28")),
    Target("PixelCNN++ of published size, 32x32, batch 1, over the naive loop (extrapolated)", 100.0, _lowest(NAIVE, family="pixelcnn", mode="plus_plus", how=_AS_USED)),
    Target("PixelCNN of 8 layers of 64 channels, 7x7, 28x28, over the naive loop (extrapolated, lower batch)", 500.0, _lowest(NAIVE, family="pixelcnn", mode="pixel_cnn", how=_AS_USED)),
    # counted: 30 GFLOP of products at batch 100, 0.3 s of one core; the published loop copies its keys and values for every token beside them
    Target("TarFlow of ml-tarflow's MNIST notebook, samples, over the published algorithm (lowest batch)", 3.0, _lowest("ml-tarflow", family="tarflow", mode="mnist")),
    Target("TarFlow of 64x64 images, 256 channels, samples, over the published algorithm (lowest batch)", 3.0, _lowest("ml-tarflow", family="tarflow", mode="small64")),
    Target("whole U-Net, DDPM's of CIFAR-10, batch 4, fp32, over eager in the same layout (lower row)", 2.0, _lowest("eager", family="model", mode="unet_cifar", dtype="fp32")),
    Target("the same over OpenVINO", 1.6, _lowest("openvino", family="model", mode="unet_cifar", dtype="fp32")),
    Target("whole U-Net, guided-diffusion's of ImageNet 64x64, batch 1, fp32, over eager in the same layout", 2.0, _lowest("eager", family="model", mode="unet_imagenet64", dtype="fp32")),
    Target("the same over OpenVINO", 1.6, _lowest("openvino", family="model", mode="unet_imagenet64", dtype="fp32")),
    Target("accelerated UNet2DModel, DDPM on CIFAR-10, fp32, over eager in the same layout (lower row)", 2.0, _lowest("eager", family="accelerate", mode="ddpm_cifar10", dtype="fp32")),
    Target("accelerated UNet2DConditionModel, SD 1.5 at half width, fp32, over eager in the same layout (lower row)", 1.5, _lowest("eager", family="accelerate", mode="sd15_half_width", dtype="fp32")),
    Target("accelerated UNet2DModel, DDPM on CIFAR-10, bf16 (a machine without AMX), over eager in the same layout (lower row)", 1.4, _lowest("eager", family="accelerate", mode="ddpm_cifar10", dtype="bf16"), amx=False),
    Target("accelerated UNet2DModel, DDPM on CIFAR-10, bf16 (a machine with AMX), over eager in the same layout (lower row)", 1.15, _lowest("eager", family="accelerate", mode="ddpm_cifar10", dtype="bf16"), amx=True),
    Target("accelerated UNet2DModel, DDPM on CIFAR-10, over OpenVINO in the same dtype (lower row)", 1.0, _lowest("openvino", family="accelerate", mode="ddpm_cifar10")),
    Target("accelerated UNet2DConditionModel, SD 1.5 at half width, bf16 (a machine without AMX), over eager in the same layout (lower row)", 1.35, _lowest("eager", family="accelerate", mode="sd15_half_width", dtype="bf16"), amx=False),
    Target("accelerated UNet2DConditionModel, SD 1.5 at half width, over OpenVINO in the same dtype (lower row)", 1.0, _lowest("openvino", family="accelerate", mode="sd15_half_width")),
    Target("accelerated AutoencoderKL decoding, fp32, over eager in the same layout (lower row)", 1.5, _lowest("eager", family="accelerate", mode="vae_decode", dtype="fp32")),
    Target("accelerated UNetModel of guided-diffusion, ImageNet 64x64, fp32, over eager in the same layout (lower row)", 2.0, _lowest("eager", family="accelerate", mode="imagenet64", dtype="fp32")),
    Target("accelerated Unet of denoising-diffusion-pytorch, fp32, over eager in the same layout (lower row)", 1.3, _lowest("eager", family="accelerate", mode="ddp_default", dtype="fp32")),
    Target("accelerated pipeline of diffusers, DDPM on CIFAR-10 by DDIM, fp32, over itself", 2.0, _lowest("eager", family="accelerate", mode="ddim_pipeline")),
    Target("accelerated nflows' MaskedAutoregressiveFlow, D=64, hidden 512, batch 256, samples, over itself", 100.0, _lowest("eager", family="accelerate_flows", mode="nflows_maf, sample")),
    Target("accelerated zuko's MAF, D=64, hidden 512, batch 256, samples, over itself", 50.0, _lowest("eager", family="accelerate_flows", mode="zuko_maf, sample")),
    Target("accelerated nflows' spline couplings, 1024x64, K=8, density, over itself", 3.0, _lowest("eager", family="accelerate_flows", mode="nflows_spline, log_prob")),
    Target("accelerated nflows' spline couplings, 1024x64, K=8, training step, over itself", 2.0, _lowest("eager", family="accelerate_flows", mode="nflows_spline, train")),
    Target("accelerated zuko's NSF, 1024x16, K=8, density, over itself", 3.0, _lowest("eager", family="accelerate_flows", mode="zuko_nsf, log_prob")),
    Target("accelerated zuko's RealNVP, 4096x64, density, over itself", 1.5, _lowest("eager", family="accelerate_flows", mode="zuko_real_nvp, log_prob")),
    Target("accelerated nflows' SimpleRealNVP, 4096x64, density, over itself", 1.3, _lowest("eager", family="accelerate_flows", mode="nflows_real_nvp, log_prob")),
    Target("accelerated FrEIA's GLOWCouplingBlock, 4096x64, density, over itself", 1.1, _lowest("eager", family="accelerate_flows", mode="freia_glow, log_prob")),
    Target("accelerated normflows' RealNVP, 4096x64, density, over itself", 1.1, _lowest("eager", family="accelerate_flows", mode="normflows_real_nvp, log_prob")),
    Target("accelerated normflows' Glow, 32x3x32x32, training step, over itself", 1.1, _lowest("eager", family="accelerate_flows", mode="normflows_glow, train")),
    Target("DDPM step at 16x3x256x256 over diffusers", 8.0, _one(_over("diffusers"), family="sampler_step", mode="ddpm, with seeds", shape=_LARGE, dtype="fp32")),
    Target("DDPM step at 1x4x64x64 over diffusers", 8.0, _one(_over("diffusers"), family="sampler_step", mode="ddpm, with seeds", shape=_SMALL, dtype="fp32")),
    Target("DDIM step at 16x3x256x256 over diffusers", 6.0, _one(_over("diffusers"), family="sampler_step", mode="ddim", shape=_LARGE, dtype="fp32")),
    Target("DDIM step at 1x4x64x64 over diffusers", 5.0, _one(_over("diffusers"), family="sampler_step", mode="ddim", shape=_SMALL, dtype="fp32")),
    Target("large DDPM step within 2x of its memory floor plus the noise", 2.0, _one(_over("floor"), family="sampler_step", mode="ddpm, with seeds", shape=_LARGE, dtype="fp32"), at_most=True),
    Target("large DDIM step within 2x of its memory floor", 2.0, _one(_over("floor"), family="sampler_step", mode="ddim", shape=_LARGE, dtype="fp32"), at_most=True),
    Target("schedulers as used at 16x3x256x256, geometric mean over diffusers", 5.0, _mean_speedup("diffusers", family="schedulers", how=_AS_USED, shape=_LARGE)),
    Target("schedulers as used at 1x4x64x64, geometric mean over diffusers", 4.0, _mean_speedup("diffusers", family="schedulers", how=_AS_USED, shape=_SMALL)),
    Target("schedulers that draw noise, with seeds, at 16x3x256x256, geometric mean over diffusers", 7.0, _mean_speedup("diffusers", family="schedulers", how=_SEEDS, shape=_LARGE)),
    Target("no scheduler as used at 16x3x256x256 under 1.6x of diffusers (lowest row)", 1.6, _lowest("diffusers", family="schedulers", how=_AS_USED, shape=_LARGE)),
    Target("no scheduler as used at 1x4x64x64 under 1.5x of diffusers (lowest row)", 1.5, _lowest("diffusers", family="schedulers", how=_AS_USED, shape=_SMALL)),
    Target("every large scheduler as used within 2x of its memory floor plus the noise (worst row)", 2.0, _one(_over("floor"), family="schedulers", how=_AS_USED, shape=_LARGE), at_most=True),
    Target("philox_normal at 4 Mi elements over torch.randn", 5.0, _one(_over("randn"), family="philox_normal", shape=_FOUR_MILLION)),
    Target("generator_normal at 3 Mi elements over torch.randn", 4.0, _one(_over("randn"), family="generator_normal", shape=_LARGE, dtype="fp32")),
    Target("generator_normal at 1x4x64x64 over torch.randn", 1.0, _one(_over("randn"), family="generator_normal", shape=_SMALL, dtype="fp32")),
    Target("Glow step, forward and backward, over the best peer (lowest row)", 1.5, _lowest("fastest", family="glow_step")),
    Target("32 layers of RealNVP and Glow in the memory of one: time over that of stored activations (worst row)", 1.35, _one(_times_of("stored"), family="reversible"), at_most=True),
    Target("group_norm on a tiny tensor, without gradients", 6.0, _one(_microseconds, family="dispatch"), at_most=True, unit=" us"),
)  # fmt: skip


def judge(rows: Sequence[Row], amx: bool = False) -> list[Verdict]:
    """Every target of a machine with matrix tiles (``amx``), or of one without, with its measured figure. A target whose rows include
    a red one is missed, whatever the others say."""
    return [_verdict(target, rows) for target in TARGETS if target.amx in (None, amx)]


def _verdict(target: Target, rows: Sequence[Row]) -> Verdict:
    red = _red_rows(target, rows)
    if red:
        return Verdict(target, Figure(None, f"red: {', '.join(red)}"), "missed")
    figure = target.measure(rows)
    if figure.value is None or math.isnan(figure.value):
        return Verdict(target, figure, "not measured")
    met = figure.value <= target.bound if target.at_most else figure.value >= target.bound
    return Verdict(target, figure, "met" if met else "missed")


def _red_rows(target: Target, rows: Sequence[Row]) -> list[str]:
    """Red rows this target would have read: those that change its answer to "something" when given placeholder figures."""
    torchs = ("eager", "compile", "openvino", "randn", NAIVE)
    peers = ("diffusers", "k-diffusion", "nflows", "zuko", "flowjax", "normflows", "FrEIA", "ml-tarflow", "stored")
    names = (*torchs, *peers, "floor")
    filled = {"times": dict.fromkeys(("fastgen", *names[:-1]), [1.0] * 3), "ratios": dict.fromkeys(names, [1.0] * 3)}
    red = [row for row in rows if not row["green"]]
    return [row["id"] for row in red if target.measure([row | filled]).value is not None]
