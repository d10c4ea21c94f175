"""Every raw op of fastgen, one line each: the library's table of contents.

Raw ops have fixed arity and no autograd; ``fastgen.ops`` is the differentiable surface over them. Schemas live in Python, so
that the ops exist (for export, Triton and the reference) on a machine without the compiled libraries too.
"""

NAMESPACE = "fastgen"

# `activation` is an index into this tuple: an int crosses the dispatcher for nothing, a string does not.
ACTIVATIONS: tuple[str | None, ...] = (None, "silu")
# What a diffusion model is trained to predict of x_t = alpha x0 + sigma epsilon: epsilon, x0, alpha epsilon - sigma x0, or
# epsilon - x0. `target` and `prediction` are indices into this tuple; -1 is none.
PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")

# fmt: off
SCHEMAS: dict[str, str] = {
    # y = act(norm(input + channel_bias) * (1 + scale) + shift), for calls without gradients
    "group_norm": "(Tensor input, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, float eps, int activation) -> Tensor",
    # the same, with what the backward needs; returns (output, mean [N, G], rstd [N, G])
    "group_norm_fwd": "(Tensor input, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, float eps, int activation) -> (Tensor, Tensor, Tensor)",
    # returns the gradients of (input, weight [C], bias [C], channel_bias [N, C], scale [N, C], shift [N, C])
    "group_norm_bwd": "(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # row `step` of a coefficient table applied to a sample; returns (x_next, prediction, corrected), the last two empty where
    # they were not asked for
    "sampler_step_fwd": "(Tensor sample, Tensor model_output, Tensor table, int step, Tensor? uncond, Tensor[] history, Tensor? noise, Tensor? seeds, Tensor? variance, Tensor? mask, Tensor? known, Tensor? known_noise, Tensor? threshold, bool return_prediction, bool return_corrected) -> (Tensor, Tensor, Tensor)",
    # the same into memory that is there; `out` may be `sample`
    "sampler_step_out": "(Tensor sample, Tensor model_output, Tensor table, int step, Tensor? uncond, Tensor[] history, Tensor? noise, Tensor? seeds, Tensor? variance, Tensor? mask, Tensor? known, Tensor? known_noise, Tensor? threshold, Tensor(a!) out, Tensor(b!)? prediction, Tensor(c!)? corrected) -> ()",
    # x_t = alphas[t_n] x0 + sigmas[t_n] epsilon, epsilon given or drawn; returns (x_t, target), the second empty where target is -1
    "q_sample_fwd": "(Tensor x0, Tensor t, Tensor alphas, Tensor sigmas, Tensor? noise, Tensor? seeds, int step, int target) -> (Tensor, Tensor)",
    # returns the gradients of (x0, noise), empty where not wanted
    "q_sample_bwd": "(Tensor? grad, Tensor? grad_target, Tensor t, Tensor alphas, Tensor sigmas, int target, bool wants_x0, bool wants_noise) -> (Tensor, Tensor)",
    # the loss of every sample [N] in fp32 (fp64 for fp64): the squared error of the prediction, and with a vlb_table the bound
    "diffusion_loss_fwd": "(Tensor model_output, Tensor x0, Tensor noise, Tensor t, Tensor alphas, Tensor sigmas, Tensor? weights, Tensor? vlb_table, int prediction, float vlb_weight) -> Tensor",
    # returns the gradient of model_output
    "diffusion_loss_bwd": "(Tensor grad, Tensor model_output, Tensor x0, Tensor noise, Tensor t, Tensor alphas, Tensor sigmas, Tensor? weights, Tensor? vlb_table, int prediction, float vlb_weight) -> Tensor",
    # standard normals of Philox4x32-10, key = seeds[n], counter = (element, step); returns [N, *] in float32
    "philox_normal": "(Tensor seeds, int[] shape, int step) -> Tensor",
}
# fmt: on
