"""What crosses the dispatcher: every raw op of fastgen, family by family, and the codes and columns its arguments are made of.

Raw ops have fixed arity and no autograd; ``fastgen.ops`` is the differentiable surface over them. Schemas live in Python, so
that the ops exist (for export, Triton and the reference) on a machine without the compiled libraries too. The C++ kernels
repeat the orders below as enums; `tests/ops/test_schema.py` compares them.
"""

NAMESPACE = "fastgen"

# `activation` is an index into this tuple: an int crosses the dispatcher for nothing, a string does not.
ACTIVATIONS: tuple[str | None, ...] = (None, "silu")

# How GELU is computed, `approximate` of torch's gelu, is an index into this tuple.
GELU_APPROXIMATIONS: tuple[str, ...] = ("none", "tanh")

# What `gated_activation` applies to the half that is gated, its `activation`, is an index into this tuple.
GATED_ACTIVATIONS: tuple[str, ...] = ("tanh", "identity")

# Where `squeeze` puts the pixel (i, j) of a block of channel c, its `order`, is an index into this tuple.
SQUEEZE_ORDERS: tuple[str, ...] = (
    "channel_major",  # channel c f^2 + i f + j
    "space_major",  # channel (i f + j) C + c
    "checkerboard",  # the same with the places in the order (0, 0), (1, 1), (0, 1), (1, 0)
)

# How `gaussian_log_prob` finds means and log-scales in one tensor [N, 2 C, *], its `layout`, is an index into this tuple.
GAUSSIAN_LAYOUTS: tuple[str, ...] = ("mean_first", "scale_first", "interleaved")
# The logarithm of the scale s of an affine coupling, of a = gain * raw_scale, or s itself; w is one a channel or the bound.
COUPLING_SCALES: tuple[str, ...] = (
    "exp",  # log s = a
    "tanh",  # log s = w tanh(a)
    "soft_tanh",  # log s = w tanh(a / w)
    "atan",  # log s = 0.636 bound atan(a)
    "sigmoid_centered",  # log s = 2 bound (sigmoid(a) - 1/2)
    "soft_clip",  # log s = a / (1 + |a / bound|)
    "sigmoid",  # s = sigmoid(a + offset) + eps
    "softplus",  # s = min(softplus(a) + eps, bound)
)
COUPLING_CENTERS: tuple[str | None, ...] = (None, "sample", "channels")  # the mean of log s over these is taken from it
COUPLING_ORDERS: tuple[str, ...] = ("scale_shift", "shift_scale")  # y = x s + t, y = (x + t) s
# Where raw scale and shift lie in one packed tensor, along its channels: halves, or alternately.
COUPLING_LAYOUTS: tuple[str, ...] = (
    "scale_first",
    "shift_first",
    "interleaved",  # the shift at even channels, the raw scale at odd ones
    "interleaved_scale_first",
)
# What a coupling transforms: everything, channels by their indices, half of the channels, or the positions with h + w even or odd.
COUPLING_MASKS: tuple[str, ...] = (
    "none",
    "indices",
    "first_half",
    "second_half",
    "checkerboard",
    "checkerboard_inverse",
)
# `codes` of affine_coupling, in order: indices into the tuples above, and two flags.
COUPLING_CODES: tuple[str, ...] = ("scale", "center", "order", "layout", "mask", "divide", "inverse")

# What an output of a masked convolution sees of the image around it, in raster order: `mask_type` is an index into this tuple.
MASK_TYPES: tuple[str, ...] = (
    "A",  # the rows above and what stands left of the centre
    "B",  # the same and the centre
    "vertical_A",  # the rows above
    "vertical_B",  # the same and the row of the centre, whole
    "horizontal_A",  # what stands left of the centre in its row
    "horizontal_B",  # the same and the centre
    "down",  # a kernel whose lowest row is that of the output, its columns around it: no tap is masked
    "down_right",  # a kernel whose last tap is the output: no tap is masked
)

# What a diffusion model is trained to predict of x_t = alpha x0 + sigma epsilon: epsilon, x0, alpha epsilon - sigma x0, or
# epsilon - x0. `target` and `prediction` are indices into this tuple; -1 is none.
PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")

# The columns of a coefficient table, in order; the coefficients c_k of the history follow, one column each, and then, for the
# third output, its e_k.
COLUMNS: tuple[str, ...] = (
    "sample",  # a: x_next takes a * sample
    "prediction",  # b: ... + b * prediction
    "model",  # d: ... + d * guided model output (before conversion and clipping)
    "noise",  # s: ... + s * noise
    "prediction_sample",  # prediction = clip(prediction_sample * sample + prediction_model * guided)
    "prediction_model",
    "clip_min",  # -inf where nothing is clipped
    "clip_max",
    "guidance_scale",  # guided = uncond + guidance_scale * (model_output - uncond)
    "output_sample",  # second output = output_sample * sample + output_prediction * prediction + output_model * guided
    "output_prediction",
    "output_model",
    "corrected_sample",  # third output = corrected_sample * sample + corrected_prediction * prediction + ...
    "corrected_prediction",
    "corrected_model",  # ... + corrected_model * guided + sum_k e_k * history_k
    "log_noise",  # with a learned variance v, s becomes s * exp(log_noise + log_noise_slope * v)
    "log_noise_slope",
    "known",  # inpainting: where mask is 0, x_next is known * known + known_noise * known_noise instead
    "known_noise",
)

# The columns of the table of the variational bound [T, 3], in order.
VLB_COLUMNS: tuple[str, ...] = (
    "mean",  # the coefficient of x0 in the mean of the posterior q(x_{t-1} | x_t, x0)
    "inverse_deviation",  # one over the standard deviation of that posterior, which is the model's where v = -1
    "log_variance_range",  # what v = 1 adds to the log variance: log beta_t less the log variance of the posterior
)

# The program of a cached sampler, one int64 tensor: PROGRAM_HEADER, then a row of BUFFER_COLUMNS for each buffer, then a record for each
# instruction: RECORD_HEADER and what `fastgen/autoregressive/program.py` says of its kind. An offset into the weights or the
# parameters is in elements, -1 is none. `moment` and `kind` are indices into the tuples below.
PROGRAM_HEADER: tuple[str, ...] = (
    "height",
    "width",
    "colors",
    "buffers",
    "instructions",
    "state",  # numbers that the buffers of one image take
    "output",  # the buffer of the logits, the first of their channels, and how many there are
    "output_start",
    "output_channels",
    "per_color",  # 1 where the network reads the colors of a pixel that are drawn before the color at hand
)
BUFFER_COLUMNS: tuple[str, ...] = (
    "constant",  # which of the constants it is, -1 where the sampler writes it
    "channels",
    "height",
    "width",
    "rows",  # that are kept, a power of two: the row y lies in place y % rows
    "left",  # columns of zeros on either side
    "right",
    "offset",  # in the state of one image, times the number of images
    "step",  # one row and column of it for so many of the image
)
RECORD_HEADER: tuple[str, ...] = ("length", "kind", "moment", "stage", "output")
INSTRUCTIONS: tuple[str, ...] = ("combine", "product", "concat", "layer_norm", "attention", "embedding")
# Once a row before it is drawn, for all columns; before a pixel is drawn; after it, and where the colors of a pixel have turns before each
# turn too; with the instructions of a row, for the row above it, which is whole by then.
MOMENTS: tuple[str, ...] = ("row", "pixel", "after", "behind")
NODE_ACTIVATIONS: tuple[str, ...] = (
    "none", "relu", "elu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "softplus", "exp",
)  # fmt: skip
# How a pixel is drawn of its logits, `kind` of DRAW_COLUMNS.
DRAWS: tuple[str, ...] = ("categorical", "bernoulli", "logistic_mixture")
DRAW_COLUMNS: tuple[str, ...] = (
    "kind",
    "count",  # levels of a categorical distribution, or mixtures
    "level_stride",  # logit of level k and color c: channel k * level_stride + c * color_stride
    "color_stride",
    "top_k",  # 0: all levels
    "levels",  # to which a mixture's draw is rounded; 0: to none
    "step",  # of the stream of uniforms
)

# What a spline does at the ends of its box, its `tails`, is an index into this tuple: continue as the identity with slope 1 there, or with
# one slope at both ends, which it has learned; or nothing is outside (None).
SPLINE_TAILS: tuple[str | None, ...] = ("linear", "circular", None)

# How the bins and slopes of a spline come of unconstrained numbers, its `parametrization`, is an index into this tuple: with a softmax and
# a softplus; or with the softmax and the exponential of what is softly clipped before.
SPLINE_PARAMETRIZATIONS: tuple[str, ...] = ("nflows", "zuko")

# The `numbers` of a spline, in order.
SPLINE_NUMBERS: tuple[str, ...] = (
    "left",  # the box [left, right] x [bottom, top]
    "right",
    "bottom",
    "top",
    "min_bin_width",  # fractions of the box
    "min_bin_height",
    "min_derivative",
    "scale",  # multiplies unnormalized widths and heights
)
# The program of a network of masked linears, one int64 tensor: NETWORK_HEADER; a row of NETWORK_LAYER for each layer, the last of which
# makes the outputs; one of NETWORK_LEVEL for each level, and of NETWORK_TASK for each task; then, in the order of the program, which
# feature of the input comes where, which column of the output, and the rows that layers add. Rows are of the values of a sample: the
# features, the constants, the units. -1 is none.
NETWORK_HEADER: tuple[str, ...] = ("features", "outputs", "rows", "constants", "layers", "levels", "tasks", "residuals")
NETWORK_LAYER: tuple[str, ...] = (
    "source",  # the first row that it reads
    "output",  # the first row of its units, once activated; -1 of the last layer
    "raw",  # the same before the activation, where another layer adds them
    "add",  # the first row of constants that are added, and that multiply
    "gate",
    "residual",  # where in the list of rows those of its units begin
    "activation",  # index into NODE_ACTIVATIONS
    "bias",  # where in the parameters
)
NETWORK_LEVEL: tuple[str, ...] = (
    "task",
    "tasks",
    "feature",
    "features",
    "output",
    "outputs",
)  # first and count of each
# Units [first, first + units) of a layer from the first `known` rows of its source, by weights [known, units] at `weights`.
NETWORK_TASK: tuple[str, ...] = ("layer", "first", "units", "known", "weights")
# How the scale of an autoregressive affine map follows from gain times the raw scale, `scale` being an index into this tuple: none, which is
# 1, or as COUPLING_SCALES says, w being the bound.
AUTOREGRESSIVE_SCALES: tuple[str, ...] = ("none", *COUPLING_SCALES)

# Family -> op -> schema. A family's name is the name of its file in every room.
# fmt: off
SCHEMAS: dict[str, dict[str, str]] = {
    "attention": {
        # softmax(scale query key^T + mask) value, [N, H, L, E] each and the mask [N, H, L, S], for calls without gradients
        "attention": "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale) -> Tensor",
        # the same, with what the backward needs; returns (output, logsumexp [N, H, L])
        "attention_fwd": "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor, Tensor)",
        # returns the gradients of (query, key, value, scores [N, H, L, S]), the last empty where not wanted
        "attention_bwd": "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, Tensor? attn_mask, bool is_causal, float scale, bool wants_scores) -> (Tensor, Tensor, Tensor, Tensor)",
    },
    "group_norm": {
        # y = act(norm(input + channel_bias) * (1 + scale) + shift), for calls without gradients; the channels of `skip` come after those
        # of input, as if the two were one
        "group_norm": "(Tensor input, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, float eps, int activation) -> Tensor",
        # the same, with what the backward needs; returns (output, mean [N, G], rstd [N, G])
        "group_norm_fwd": "(Tensor input, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, float eps, int activation) -> (Tensor, Tensor, Tensor)",
        # the same with the output in the dtype of the statistics, fp32 for fp16 and bf16: what CUDA autocast asks for
        "group_norm_wide_fwd": "(Tensor input, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, float eps, int activation) -> (Tensor, Tensor, Tensor)",
        # returns the gradients of (input and skip in one, weight [C], bias [C], channel_bias [N, C], scale [N, C], shift [N, C]);
        # grad_output in the dtype of either output
        "group_norm_bwd": "(Tensor grad_output, Tensor input, Tensor? skip, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    },
    "group_norm_affine": {
        # (a, c) [N, C] in fp32 (fp64 for fp64) with norm(input + channel_bias) * (1 + scale) + shift = input * a + c; `skip` as above
        "group_norm_affine": "(Tensor input, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, float eps) -> (Tensor, Tensor)",
        # the same from moments [N, C, 3] in float64 of each channel of input and of skip, as convolutions return them: neither is read, but for
        # the values by which one that has changed is known, and then read
        "group_norm_affine_known": "(Tensor input, Tensor? skip, Tensor moments, Tensor? skip_moments, int num_groups, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, float eps) -> (Tensor, Tensor)",
    },
    "geglu": {
        # h * gelu(gate) of [M, C] with (h, gate) = input weight^T + bias, each [M, D], whichever way is fastest
        "geglu_fwd": "(Tensor input, Tensor weight, Tensor? bias, int approximate) -> Tensor",
        # the same by the library's product, so many rows at a time that they stay in the cache
        "geglu_chunked": "(Tensor input, Tensor weight, Tensor? bias, int approximate) -> Tensor",
        # the weights [2 panels, C, 16] in fp32, 16 of h and 16 of the gate in turn
        "geglu_pack": "(Tensor weight) -> Tensor",
        # geglu_fwd by weights so packed, of D features
        "geglu_packed": "(Tensor input, Tensor packed, int features, Tensor? bias, int approximate) -> Tensor",
        # the weights [2 panels, blocks, 16 pairs of channels, 16 features x 2] in bfloat16, for matrix tiles
        "geglu_direct_pack": "(Tensor weight) -> Tensor",
        # geglu_fwd of bfloat16 by weights so packed
        "geglu_direct": "(Tensor input, Tensor packed, int features, Tensor? bias, int approximate) -> Tensor",
        # h * gelu(gate) of [M, 2 D]
        "geglu_gate": "(Tensor projected, int approximate) -> Tensor",
        # returns its gradient of projected
        "geglu_gate_bwd": "(Tensor grad_output, Tensor projected, int approximate) -> Tensor",
    },
    "gated_activation": {
        # act(a + c_a) sigmoid(b + c_b) of input [N, 2 C, *] = (a, b), the condition (c_a, c_b) [N, 2 C] or of the shape of the input
        "gated_activation_fwd": "(Tensor input, Tensor? condition, int activation) -> Tensor",
        # returns the gradients of (input, condition), the latter in fp32 (fp64 for fp64), empty but for a condition [N, 2 C]: that of one
        # of the shape of the input is the input's
        "gated_activation_bwd": "(Tensor grad_output, Tensor input, Tensor? condition, int activation) -> (Tensor, Tensor)",
    },
    "affine_coupling": {
        # y = x s + t or (x + t) s where the mask says, input elsewhere, s of raw_scale; returns (output, log_det [N] in fp32, fp64 for fp64).
        # raw_scale and shift [N, C', *], or both in raw_scale [N, 2 C', *]; scale_weight [C']; indices [C'] of the transformed channels
        "affine_coupling_fwd": "(Tensor input, Tensor raw_scale, Tensor? shift, Tensor? scale_weight, Tensor? indices, int[] codes, float bound, float offset, float eps, float gain) -> (Tensor, Tensor)",
        # returns the gradients of (input, raw_scale, shift, scale_weight), packed where raw_scale is, the last in fp32 (fp64 for fp64),
        # empty where there is no such tensor
        "affine_coupling_bwd": "(Tensor grad_output, Tensor grad_log_det, Tensor input, Tensor raw_scale, Tensor? shift, Tensor? scale_weight, Tensor? indices, int[] codes, float bound, float offset, float eps, float gain) -> (Tensor, Tensor, Tensor, Tensor)",
        # y = x + t, or x - t for the inverse, where the mask says
        "affine_coupling_additive": "(Tensor input, Tensor shift, Tensor? indices, int mask, bool inverse) -> Tensor",
    },
    "concat_elu": {
        # elu(x) and elu(-x) of [N, C, *] side by side, [N, 2 C, *]
        "concat_elu_fwd": "(Tensor input) -> Tensor",
        # returns its gradient of input
        "concat_elu_bwd": "(Tensor grad_output, Tensor input) -> Tensor",
    },
    "actnorm": {
        # x scale + shift, or (x + shift) scale, a number each a channel [C], or the inverse; returns (output, log_det [N])
        "actnorm_fwd": "(Tensor input, Tensor scale, Tensor shift, bool log_scale, bool shift_first, bool inverse) -> (Tensor, Tensor)",
        # returns the gradients of (input, scale, shift)
        "actnorm_bwd": "(Tensor grad_output, Tensor? grad_log_det, Tensor input, Tensor scale, Tensor shift, bool log_scale, bool shift_first, bool inverse) -> (Tensor, Tensor, Tensor)",
        # (mean, deviation) [C] over samples and positions
        "actnorm_statistics": "(Tensor input, int correction) -> (Tensor, Tensor)",
    },
    "invertible_conv1x1": {
        # weight z + bias over channels with z = x scale + shift, or (x + shift) scale; weight [C, C], the others [C]
        "invertible_conv1x1_fwd": "(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, Tensor? bias, bool shift_first) -> Tensor",
        # returns the gradients of (input, weight, scale, shift, bias), whichever were given
        "invertible_conv1x1_bwd": "(Tensor grad_output, Tensor input, Tensor weight, Tensor? scale, Tensor? shift, bool shift_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        # positions (log |det weight| + sum log |scale|) as [n], in fp64 where `wide`; and where `gradient` that of log |det weight|,
        # positions weight^-T, else [0, 0]
        "invertible_conv1x1_log_det": "(Tensor weight, Tensor? scale, bool log_scale, SymInt n, SymInt positions, bool wide, bool gradient) -> (Tensor, Tensor)",
    },
    "squeeze": {
        # [N, C, H, W] as [N, C f^2, H / f, W / f], or the way back, which is its backward
        "squeeze": "(Tensor input, int factor, int order, bool inverse) -> Tensor",
    },
    "gaussian_log_prob": {
        # the log-density [N] under normals of this mean and log-scale, of the shape of the input each, or both in `mean` [N, 2 C, *]
        "gaussian_log_prob_fwd": "(Tensor input, Tensor? mean, Tensor? log_scale, int layout) -> Tensor",
        # returns the gradients of (input, mean, log_scale), the last two as they were given
        "gaussian_log_prob_bwd": "(Tensor grad_log_prob, Tensor input, Tensor? mean, Tensor? log_scale, int layout) -> (Tensor, Tensor, Tensor)",
    },
    "linear_attention": {
        # scale context^T softmax(query) with context = softmax(key) value^T, the softmax of queries over features [D], that of keys over
        # positions [M memories, then L]; [N, H, D, L] each and memories [H, D, M]; for calls without gradients
        "linear_attention": "(Tensor query, Tensor key, Tensor value, Tensor? memory_key, Tensor? memory_value, float scale) -> Tensor",
        # the same, with what the backward needs; returns (output [N, H, E, L], context [N, H, D, E], statistics of the keys [N, H, 2, D])
        "linear_attention_fwd": "(Tensor query, Tensor key, Tensor value, Tensor? memory_key, Tensor? memory_value, float scale) -> (Tensor, Tensor, Tensor)",
        # returns the gradients of (query, key, value, memory_key, memory_value), the last two empty where there is no memory
        "linear_attention_bwd": "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? memory_key, Tensor? memory_value, Tensor context, Tensor statistics, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    },
    "layer_norm": {
        # s = input, or gate * input + residual; y = norm(s) * (1 + scale) + shift over the last dimension, the small tensors [C] or
        # [N, C]; for calls without gradients; returns (output, s), the second empty without a residual
        "layer_norm": "(Tensor input, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps) -> (Tensor, Tensor)",
        # the same, with what the backward needs; returns (output, s, mean, rstd), the statistics of each row
        "layer_norm_fwd": "(Tensor input, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
        # `normalized` is s, `branch` the input where there is a gate; returns the gradients of (s, branch, gate, weight, bias, scale,
        # shift), of branch and gate empty without a gate, of scale and shift without either
        "layer_norm_bwd": "(Tensor grad_output, Tensor? grad_sum, Tensor normalized, Tensor mean, Tensor rstd, Tensor? branch, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    },
    "rms_norm": {
        # y = act(input * rstd * weight * (1 + scale) + shift) with rstd = 1 / max(sqrt(mean(input^2) + eps), min_norm / sqrt(C)), the mean
        # over dimension 1 or the last; for calls without gradients
        "rms_norm": "(Tensor input, bool over_channels, Tensor? weight, Tensor? scale, Tensor? shift, float eps, float min_norm, int activation) -> Tensor",
        # the same, with what the backward needs; returns (output, rstd)
        "rms_norm_fwd": "(Tensor input, bool over_channels, Tensor? weight, Tensor? scale, Tensor? shift, float eps, float min_norm, int activation) -> (Tensor, Tensor)",
        # returns the gradients of (input, weight [C], scale [N, C], shift [N, C]), the last two empty where neither was given
        "rms_norm_bwd": "(Tensor grad_output, Tensor input, Tensor rstd, bool over_channels, Tensor? weight, Tensor? scale, Tensor? shift, float min_norm, int activation) -> (Tensor, Tensor, Tensor, Tensor)",
    },
    "sampler_step": {
        # row `step` of a coefficient table applied to a sample; returns (x_next, prediction, corrected), the last two empty where
        # they were not asked for
        "sampler_step_fwd": "(Tensor sample, Tensor model_output, Tensor table, SymInt step, Tensor? uncond, Tensor[] history, Tensor? noise, Tensor? seeds, Tensor? variance, Tensor? mask, Tensor? known, Tensor? known_noise, Tensor? threshold, bool return_prediction, bool return_corrected) -> (Tensor, Tensor, Tensor)",
        # the same into memory that is there; `out` may be `sample`
        "sampler_step_out": "(Tensor sample, Tensor model_output, Tensor table, SymInt step, Tensor? uncond, Tensor[] history, Tensor? noise, Tensor? seeds, Tensor? variance, Tensor? mask, Tensor? known, Tensor? known_noise, Tensor? threshold, Tensor(a!) out, Tensor(b!)? prediction, Tensor(c!)? corrected) -> ()",
    },
    "q_sample": {
        # x_t = alphas[t_n] x0 + sigmas[t_n] epsilon, epsilon given or drawn; returns (x_t, target), the second empty where target is -1
        "q_sample_fwd": "(Tensor x0, Tensor t, Tensor alphas, Tensor sigmas, Tensor? noise, Tensor? seeds, SymInt step, int target) -> (Tensor, Tensor)",
        # returns the gradients of (x0, noise), empty where not wanted
        "q_sample_bwd": "(Tensor? grad, Tensor? grad_target, Tensor t, Tensor alphas, Tensor sigmas, int target, bool wants_x0, bool wants_noise) -> (Tensor, Tensor)",
    },
    "diffusion_loss": {
        # the loss of every sample [N] in fp32 (fp64 for fp64): the squared error of the prediction, and with a vlb_table the bound
        "diffusion_loss_fwd": "(Tensor model_output, Tensor x0, Tensor noise, Tensor t, Tensor alphas, Tensor sigmas, Tensor? weights, Tensor? vlb_table, int prediction, float vlb_weight) -> Tensor",
        # returns the gradient of model_output
        "diffusion_loss_bwd": "(Tensor grad, Tensor model_output, Tensor x0, Tensor noise, Tensor t, Tensor alphas, Tensor sigmas, Tensor? weights, Tensor? vlb_table, int prediction, float vlb_weight) -> Tensor",
    },
    "philox_normal": {
        # standard normals of Philox4x32-10, key = seeds[n], counter = (element, step); returns [N, *] in float32
        "philox_normal": "(Tensor seeds, SymInt[] shape, SymInt step) -> Tensor",
    },
    "categorical_sample": {
        # a level of logits [N, K, *] at each position, by uniform element + position of Philox, key = seeds[n], counter = (element, step, 1);
        # top_k 0 and top_p 1 cut nothing; returns (levels [N, *] in int64, their log-probabilities, empty where not asked for)
        "categorical_sample": "(Tensor logits, Tensor seeds, SymInt element, SymInt step, float temperature, int top_k, float top_p, bool return_log_prob) -> (Tensor, Tensor)",
    },
    "logistic_mixture": {
        # the negative log-likelihood [N] in fp32 (fp64 for fp64), in nats, of images [N, 3 or 1, H, W] under mixtures of discretised
        # logistics [N, 10 M or 3 M, H, W]
        "logistic_mixture_fwd": "(Tensor logits, Tensor target, int levels) -> Tensor",
        # returns the gradient of logits
        "logistic_mixture_bwd": "(Tensor grad, Tensor logits, Tensor target, int levels) -> Tensor",
        # images [N, channels, H, W] in fp32 (fp64 for fp64) by uniforms element + (channels + 1) position and on; levels 0 rounds nothing
        "logistic_mixture_sample": "(Tensor logits, Tensor seeds, int channels, SymInt element, SymInt step, int levels, float temperature) -> Tensor",
    },
    "rational_quadratic_spline": {
        # a monotone spline of K bins at every element of input [N, C, *], or of its channels `mask` [C'], the others copied; widths [N, C', *, K],
        # heights and derivatives, or all three packed in the first; bounds [C'] are half boxes a channel in place of `numbers`' box; returns
        # (output, log-determinant in fp32 (fp64 for fp64), [N] where it is reduced, else one an element)
        "rational_quadratic_spline_fwd": "(Tensor input, Tensor widths, Tensor? heights, Tensor? derivatives, Tensor? mask, Tensor? bounds, float[] numbers, int num_bins, int tails, int parametrization, bool inverse, bool reduce) -> (Tensor, Tensor)",
        # returns the gradients of (input, widths, heights, derivatives), the last two empty where packed, the last three where not wanted
        "rational_quadratic_spline_bwd": "(Tensor grad_output, Tensor grad_log_det, Tensor input, Tensor widths, Tensor? heights, Tensor? derivatives, Tensor? mask, Tensor? bounds, float[] numbers, int num_bins, int tails, int parametrization, bool inverse, bool reduce, bool wants_parameters) -> (Tensor, Tensor, Tensor, Tensor)",
    },
    "conv2d": {
        # (conv(act(input * input_scale + input_shift)) + bias + embedding + residual) * output_scale, whichever way is fastest; the channels
        # of `skip` come after those of input, as if the two were one, here and below
        "conv2d_fwd": "(Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> Tensor",
        # the weights [points, panels, C, 16] of tiles of outputs x outputs in fp32: Winograd's for a 3x3 kernel with 4 or 2, a 1x1 kernel's own with 1
        "conv2d_pack": "(Tensor weight, int outputs) -> Tensor",
        # conv2d_fwd of stride 1, the size kept, by weights so packed
        "conv2d_packed": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> Tensor",
        # the weights of a 3x3 or 1x1 kernel for matrix tiles, [1, panels, C / 32, taps, 16, 32] in bfloat16, pairs of channels side by side
        "conv2d_direct_pack": "(Tensor weight) -> Tensor",
        # conv2d_packed of a bfloat16 image by weights so packed
        "conv2d_direct": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> Tensor",
        # conv2d_packed and conv2d_direct, and the moments of each channel of the output as it is stored, for the norm after them: [N, K, 3]
        # in float64, mean, sum of squared deviations and, of some channels, one of the values by which a changed image is known
        "conv2d_packed_moments": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> (Tensor, Tensor)",
        "conv2d_direct_moments": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> (Tensor, Tensor)",
    },
    "masked_conv2d": {
        # conv(input, weight) + bias of stride 1, the size kept, by the taps of the mask alone, whichever way is fastest
        "masked_conv2d_fwd": "(Tensor input, Tensor weight, Tensor? bias, int mask_type, int[2] dilation, int groups, int color_channels) -> Tensor",
        # returns the gradients of (input, weight), empty where not wanted; that of weight is zero at masked taps
        "masked_conv2d_bwd": "(Tensor grad_output, Tensor input, Tensor weight, int mask_type, int[2] dilation, int groups, int color_channels, bool wants_input, bool wants_weight) -> (Tensor, Tensor)",
        # the weights of the taps [panels, taps, C / groups, 16] in fp32; transposed for the gradient of the input, from the last tap to the first
        "masked_conv2d_pack": "(Tensor weight, int mask_type, int groups, int color_channels, bool transposed) -> Tensor",
        # masked_conv2d_fwd by weights so packed, or, transposed, the gradient of the input from that of the output
        "masked_conv2d_packed": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, int[2] kernel, int mask_type, int[2] dilation, int groups, int color_channels, bool transposed) -> Tensor",
        # the gradient of the weight [K, C / groups, kh, kw] in fp32, by our products
        "masked_conv2d_weight_bwd": "(Tensor grad_output, Tensor input, int[2] kernel, int mask_type, int[2] dilation, int groups, int color_channels) -> Tensor",
    },
    "upsample_conv2d": {
        # conv2d_fwd of the image upsampled by two to the nearest, a 3x3 kernel, padding 1, whichever way is fastest
        "upsample_conv2d_fwd": "(Tensor input, Tensor weight, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> Tensor",
        # the weights [4 (outputs + 1)^2, panels, C, 16] of tiles of outputs x outputs of each of four phases, in fp32
        "upsample_conv2d_pack": "(Tensor weight, int outputs) -> Tensor",
        # upsample_conv2d_fwd by weights so packed
        "upsample_conv2d_packed": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> Tensor",
        # the same of matrix tiles, [4, panels, C / 32, 4, 16, 32] in bfloat16: the 2x2 sums that each phase of the output sees
        "upsample_conv2d_direct_pack": "(Tensor weight) -> Tensor",
        "upsample_conv2d_direct": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> Tensor",
        # these two with the moments of the output, as of conv2d
        "upsample_conv2d_packed_moments": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> (Tensor, Tensor)",
        "upsample_conv2d_direct_moments": "(Tensor input, Tensor packed, int out_channels, Tensor? bias, Tensor? input_scale, Tensor? input_shift, int activation, Tensor? embedding, Tensor? residual, float output_scale, Tensor? skip) -> (Tensor, Tensor)",
    },
    "incremental": {
        # images [N, C, H, W] drawn pixel by pixel by a program; pixels that are `known` are as given; `levels` are the values of a categorical
        # distribution's levels; returns (images, log-probabilities [N, H, W], logits [N, O, H, W], the last empty where not wanted)
        "incremental_sample": "(Tensor image, Tensor? known, Tensor program, Tensor weights, Tensor parameters, Tensor[] constants, Tensor levels, Tensor seeds, int[] draw, float temperature, float top_p, int channels, bool return_logits) -> (Tensor, Tensor, Tensor)",
        # the logits [N, O] of one color of one pixel, once all before it, in raster order, have been asked for; the state begins as zeros
        "incremental_step": "(Tensor(a!) state, Tensor image, Tensor program, Tensor weights, Tensor parameters, Tensor[] constants, int row, int column, int color, int channels) -> Tensor",
    },
    "causal_transformer_inverse": {
        # x_0 = z_0, x_{t+1} = exp(a_t) z_{t+1} + b_t with (a, b) = transformer(x_0 .. x_t), input [N, T, D]; weights are packed
        # [panels, C, 16]: in, (qkv, projection, up, down) a layer, out; parameters: the bias of in, (norm's weight and bias, biases of
        # qkv and projection, norm's weight and bias, biases of up and down) a layer, the bias of out; returns (x, sum of a [N])
        "causal_transformer_inverse": "(Tensor input, Tensor position, Tensor? condition, Tensor? unconditional, Tensor? guidance, Tensor[] weights, Tensor[] parameters, int heads, float eps, float unconditional_temperature) -> (Tensor, Tensor)",
    },
    "masked_linear": {
        # input (weight mask)^T + bias of [M, C] with weight and boolean mask [O, C]; what the mask hides of the weight is not read
        "masked_linear_fwd": "(Tensor input, Tensor weight, Tensor? bias, Tensor mask) -> Tensor",
        # returns the gradients of (input, weight), empty where not wanted; that of weight is 0 where the mask is
        "masked_linear_bwd": "(Tensor grad_output, Tensor input, Tensor weight, Tensor mask, bool wants_input, bool wants_weight) -> (Tensor, Tensor)",
        # the gradient of weight alone, in fp32 (fp64 for fp64): `rows` [O] and `columns` [C] are its rows and columns in an order in which the
        # row at each place reads of the columns at most the first `known` [O]
        "masked_linear_weight_bwd": "(Tensor grad_output, Tensor input, Tensor mask, Tensor rows, Tensor columns, Tensor known) -> Tensor",
        # numbers of a flattened weight by their places, int32 [P], 0 where a place is -1; in fp32 (fp64 for fp64). Tasks [T, 2] are their
        # numbers of lines and units, one task behind the other; each is followed `block` lines at a time
        "masked_linear_pack": "(Tensor weight, Tensor gather, Tensor tasks, int block) -> Tensor",
        # the outputs [N, O] of a program of masked linears, from all features [N, D] and constants [N, C] of each sample
        "masked_linear_network": "(Tensor input, Tensor program, Tensor weights, Tensor parameters, Tensor? constants, int outputs) -> Tensor",
    },
    "autoregressive_inverse": {
        # (x, log |det dx/dy|) with y = s x + t, or y = (x - t) / s where `multiply`, (s, t) of each feature from the features before it
        # by a program of masked linears; numbers: bound, offset, eps and gain of AUTOREGRESSIVE_SCALES
        "autoregressive_inverse": "(Tensor input, Tensor program, Tensor weights, Tensor parameters, Tensor? constants, int scale, float[] numbers, bool shift_first, bool multiply) -> (Tensor, Tensor)",
        # the same with the inverses of rational-quadratic splines of SPLINE_NUMBERS, of each feature num_bins widths, heights and so many
        # derivatives; `turn`: x is modulo the box, [-bound, bound], less its bound, of which circular splines are made
        "autoregressive_inverse_spline": "(Tensor input, Tensor program, Tensor weights, Tensor parameters, Tensor? constants, float[] numbers, int num_bins, int derivatives, int tails, int parametrization, bool turn) -> (Tensor, Tensor)",
        # the outputs [N, outputs of the level] once the features of the level before, [N, features], are known; the constants are read
        # at level 0
        "autoregressive_inverse_advance": "(Tensor(a!) state, Tensor known, Tensor program, Tensor weights, Tensor parameters, Tensor? constants, int level, int outputs) -> Tensor",
    },
    "generator_normal": {
        # the normals that torch.randn draws from a CPU generator with this state [5056], or a sample from each of [N, 5056], and the
        # states that it leaves; wide_angle: the angles are rounded as torch's scalar code rounds them
        "generator_normal": "(Tensor states, SymInt[] shape, ScalarType dtype, bool wide_angle) -> (Tensor, Tensor)",
    },
}
# fmt: on

# Families that have no kernels for GPUs, and no need of any.
CPU_ONLY: tuple[str, ...] = (
    "conv2d",  # on a GPU the library's convolution wins
    "upsample_conv2d",  # the same
    "group_norm_affine",  # what conv2d reads
    "generator_normal",  # the states of CPU generators; torch draws from those of a GPU
    "causal_transformer_inverse",  # on a GPU each product of a step spans the machine: the library's, over a cache
)

# Family -> public functions of it that are not called after it.
FURTHER_FUNCTIONS: dict[str, tuple[str, ...]] = {"affine_coupling": ("additive_coupling",)}

# Op -> family.
FAMILY_OF: dict[str, str] = {op: family for family, ops in SCHEMAS.items() for op in ops}
