"""Unmodified pipelines of diffusers, of tiny modules with random weights: the images are those of diffusers' own scheduler."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastgen.samplers import from_diffusers

from .parity import diffusers, ours


def unet(channels=3, **kwargs):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **kwargs,
    ).eval()  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    made = [torch.Generator().manual_seed(n) for n in numbers]
    return made[0] if len(made) == 1 else made


PIPELINES = {"DDPM": ("DDPMPipeline", "DDPMScheduler"), "DDIM": ("DDIMPipeline", "DDIMScheduler")}


@pytest.mark.parametrize("generators", [(4,), (4, 5)], ids=["one generator", "a list"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_unconditional_twice(kind, generators):
    """Two calls, the second of which follows nothing, and a call of another length."""
    pipeline, scheduler = (getattr(diffusers, name) for name in PIPELINES[kind])
    images = []
    for fused in (False, True):
        pipe = quiet(pipeline(unet(), scheduler()))
        if fused:
            pipe.scheduler = from_diffusers(pipe.scheduler)
        drawn = [
            pipe(batch_size=2, generator=seeds(*generators), num_inference_steps=n, output_type="np").images
            for n in (6, 6, 4)
        ]
        np.testing.assert_allclose(drawn[0], drawn[1], rtol=0, atol=1e-5)
        images.append(drawn)
        assert getattr(pipe.scheduler, "fallbacks", {}) == {}
    assert isinstance(pipe.scheduler, ours.FusedScheduler)
    for theirs, mine in zip(*images, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unconditional_in_half_precision(dtype, eta):
    images = []
    for fused, of in ((False, torch.float32), (False, dtype), (True, dtype)):
        pipe = quiet(diffusers.DDIMPipeline(unet().to(of), diffusers.DDIMScheduler()))
        if fused:
            pipe.scheduler = from_diffusers(pipe.scheduler)
        torch.manual_seed(0)
        start = torch.randn(2, 3, 8, 8)
        with torch.no_grad():  # as the pipeline does; its own start would be other numbers in another dtype
            pipe.scheduler.set_timesteps(6)
            x = start.to(of)
            for t in pipe.scheduler.timesteps:
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(t))).to(of)
                x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x, eta=eta, variance_noise=noise if eta else None)[0]
        assert x.dtype == of
        images.append(x.double())
        if of == torch.float16:  # the pipeline makes an array of its image, and NumPy has no bfloat16
            whole = pipe(generator=seeds(1), num_inference_steps=2, eta=eta, output_type="np").images
            assert np.isfinite(whole).all()
    exact, theirs, mine = images
    assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_ddim_pipelines_convert_what_they_are_made_with():
    """Their constructor makes a scheduler of diffusers' own of any other; swapped in afterwards a stand-in stays."""
    pipe = quiet(diffusers.DDIMPipeline(unet(), ours.DDIMScheduler(clip_sample=False)))
    assert not isinstance(pipe.scheduler, ours.FusedScheduler) and pipe.scheduler.config.clip_sample is False
    pipe.scheduler = from_diffusers(pipe.scheduler)
    pipe(num_inference_steps=2, output_type="np")
    assert isinstance(pipe.scheduler, ours.FusedScheduler) and pipe.scheduler.fallbacks == {}


# ---- saved and loaded ----------------------------------------------------------------------------------------------------------


def test_saved_with_a_stand_in_and_loaded(tmp_path):
    """By diffusers alone, in a process in which fastgen cannot be imported; and with another stand-in of ours."""
    pipe = quiet(diffusers.DDPMPipeline(unet(), ours.DDPMScheduler(beta_schedule="squaredcos_cap_v2")))
    pipe.save_pretrained(tmp_path)
    expected = pipe(generator=seeds(1), num_inference_steps=3, output_type="np").images
    code = (
        "import sys; sys.modules['fastgen'] = None\n"
        "import diffusers, numpy, torch\n"
        f"pipe = diffusers.DDPMPipeline.from_pretrained({str(tmp_path)!r}, local_files_only=True)\n"
        "assert type(pipe.scheduler) is diffusers.DDPMScheduler and pipe.scheduler.config.beta_schedule == 'squaredcos_cap_v2'\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "images = pipe(generator=torch.Generator().manual_seed(1), num_inference_steps=3, output_type='np').images\n"
        f"numpy.save({str(tmp_path / 'images.npy')!r}, images)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, rtol=0, atol=1e-5)
    scheduler = ours.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    loaded = quiet(diffusers.DDPMPipeline.from_pretrained(tmp_path, scheduler=scheduler, local_files_only=True))
    assert loaded.scheduler is scheduler
    again = loaded(generator=seeds(1), num_inference_steps=3, output_type="np").images
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5)
    generic = diffusers.DiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler, local_files_only=True)
    assert generic.scheduler is scheduler and generic.components["scheduler"] is scheduler


# ---- latent diffusion: a tiny transformer, a tiny autoencoder, prompts that are embeddings -------------------------------------


def latent_parts():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=8,
        norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    return vae, model


class Latent(diffusers.DiffusionPipeline):
    """What text-to-image, image-to-image and inpainting pipelines do with a scheduler, where there is no text encoder."""

    def __init__(self, vae, unet, scheduler):
        super().__init__()
        config = {**scheduler.config}
        if (
            config.get("steps_offset", 1) != 1
        ):  # the correction of an outdated configuration, as those pipelines make it
            scheduler._internal_dict = diffusers.configuration_utils.FrozenDict({**config, "steps_offset": 1})
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, embeddings, generator, steps=8, image=None, mask=None, strength=0.6, guidance=3.0):
        scheduler = self.scheduler
        scheduler.set_timesteps(steps)
        timesteps, begin = scheduler.timesteps, 0
        noise = diffusers.utils.torch_utils.randn_tensor((len(embeddings) // 2, 4, 8, 8), generator=generator)
        if image is None:
            x = noise * scheduler.init_noise_sigma
        else:
            begin = max(steps - int(steps * strength), 0) * scheduler.order
            timesteps = timesteps[begin:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            clean = self.vae.encode(image).latent_dist.mean
            x = scheduler.add_noise(clean, noise, timesteps[:1].repeat(len(noise)))
        for i, t in enumerate(timesteps):
            output = self.unet(scheduler.scale_model_input(torch.cat([x, x]), t), t, embeddings).sample
            free, conditional = output.chunk(2)
            x = scheduler.step(free + guidance * (conditional - free), t, x, return_dict=False)[0]
            if mask is not None:
                known = clean
                if i < len(timesteps) - 1:
                    known = scheduler.add_noise(clean, noise, timesteps[i + 1 : i + 2].repeat(len(noise)))
                x = mask * x + (1 - mask) * known
        return x, self.vae.decode(x).sample


TASKS = {
    "text to image": {},
    "image to image": {"image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))},
    "inpainting": {
        "image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        "mask": (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.5).float(),
    },
}
LATENT = [
    "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler",
    "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", LATENT)
def test_latent_pipelines_twice(name, task):
    """With the outdated configuration that old checkpoints have, one generator and a list of them."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    config |= {"skip_prk_steps": True} if name.startswith("PNDM") else {}
    vae, model = latent_parts()
    embeddings = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3))
    results = []
    for made in (getattr(diffusers, name)(**config), getattr(ours, name)(**config)):
        pipe = quiet(Latent(vae, model, made))
        assert pipe.scheduler is made
        results.append([])
        for k in range(2):
            torch.manual_seed(0)
            results[-1] += pipe(embeddings, seeds(1) if k else seeds(1, 2), **TASKS[task])
    assert made.fallbacks == {} and made.config.get("steps_offset", 1) == 1
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
