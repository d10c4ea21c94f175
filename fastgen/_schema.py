"""Every raw op of fastgen, one line each: the library's table of contents.

Raw ops have fixed arity and no autograd; ``fastgen.ops`` is the differentiable surface over them. Schemas live in Python, so
that the ops exist (for export, Triton and the reference) on a machine without the compiled libraries too.
"""

NAMESPACE = "fastgen"

# `activation` is an index into this tuple: an int crosses the dispatcher for nothing, a string does not.
ACTIVATIONS: tuple[str | None, ...] = (None, "silu")

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
    # standard normals of Philox4x32-10, key = seeds[n], counter = (element, step); returns [N, *] in float32
    "philox_normal": "(Tensor seeds, int[] shape, int step) -> Tensor",
}
# fmt: on
