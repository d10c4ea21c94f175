"""The names that programs import from here: they stay. And the import stays light."""

import importlib

import pytest

from .. import fresh
from ..backends import import_peer

SAMPLERS = """
DDIM DDPM DEIS DPM2 LCM LMS PNDM SOLVERS TCD AutoGuidance BrownianTree CapturedSampler ClassifierFreeGuidance
ClassifierGuidance Consistency DPM2Ancestral DPMSolverPP DPMSolverPP2SAncestral DPMSolverPPMultistepSDE DPMSolverPPSDE
DiscreteSolver EDMDPMSolverPP EDMEuler EDMHeun EDMSolver Euler EulerAncestral FlowEuler FlowHeun FlowSolver Guidance Heun
Linear Path PerpNegGuidance Plan Prediction ProjectedGuidance RePaint SASolver SigmaSolver Solver Trace UniPC
ZeroStarGuidance alphas_cumprod coefficient_table diffusers draw_normal dynamic_threshold flow_shift from_diffusers
k_diffusion linear_betas make_solver noising_tables sample scaled_linear_betas score sigmoid_betas spaced_sigmas
squared_cosine_betas timestep_spacing vlb_table zero_terminal_snr
"""
NAMES = {
    "fastgen.samplers": SAMPLERS,
    "fastgen.samplers.guidance": """
        AutoGuidance Call ClassifierFreeGuidance ClassifierGuidance Guidance Model PerpNegGuidance ProjectedGuidance
        ZeroStarGuidance rescaled
    """,
    "fastgen.samplers.k_diffusion": """
        BrownianTreeNoiseSampler PIDStepSizeController append_zero default_noise_sampler get_ancestral_step
        get_sigmas_exponential get_sigmas_karras get_sigmas_polyexponential get_sigmas_vp sample_dpm_2
        sample_dpm_2_ancestral sample_dpm_adaptive sample_dpm_fast sample_dpmpp_2m sample_dpmpp_2m_sde
        sample_dpmpp_2s_ancestral sample_dpmpp_3m_sde sample_dpmpp_sde sample_euler sample_euler_ancestral sample_heun
        sample_lms to_d
    """,
    "fastgen.samplers.score": """
        SDE VE VP Blur Corruption Discrete GaussianNoise Mask SubVP bits_per_dim cold_diffusion encode
        hemisphere_prior log_likelihood perturb poisson_field poisson_flow poisson_flow_loss poisson_perturb
        predictor_corrector reverse_sde sample_corruption sample_ode score_from_denoiser score_from_noise
    """,
    "fastgen.samplers.diffusers": """
        CMStochasticIterativeScheduler CosineDPMSolverMultistepScheduler DDIMInverseScheduler DDIMScheduler
        DDPMScheduler DEISMultistepScheduler DPMSolverMultistepInverseScheduler DPMSolverMultistepScheduler
        DPMSolverSDEScheduler DPMSolverSinglestepScheduler EDMDPMSolverMultistepScheduler EDMEulerScheduler
        EulerAncestralDiscreteScheduler EulerDiscreteScheduler FlowMatchEulerDiscreteScheduler
        FlowMatchHeunDiscreteScheduler HeunDiscreteScheduler IPNDMScheduler KDPM2AncestralDiscreteScheduler
        KDPM2DiscreteScheduler LCMScheduler LMSDiscreteScheduler PNDMScheduler RePaintScheduler
        SASolverScheduler TCDScheduler UniPCMultistepScheduler FusedScheduler from_diffusers stand_in
    """,
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_stay(module):
    if module.endswith("diffusers"):
        import_peer("diffusers")
    package, expected = importlib.import_module(module), set(NAMES[module].split())
    names = set(dir(package))  # what is loaded at its first use is not in `__all__`, nor what needs another package
    assert expected | set(package.__all__) <= names, sorted(expected - names)
    assert all(hasattr(package, name) for name in package.__all__)


def test_the_import_is_light():
    """Neither the peers nor what only some schedules need, nor a GPU's compiler."""
    code = "import sys, fastgen.samplers; print(*sys.modules)"
    loaded = fresh.run(code).stdout.split()
    assert not {"diffusers", "transformers", "scipy", "triton", "k_diffusion", "torchsde"} & set(loaded)
