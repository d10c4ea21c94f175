// q_sample: forward noising, x_t = alpha[t_n] x0 + sigma[t_n] epsilon, with the training target in the same pass.
//
// Both outputs are combinations of x0 and epsilon whose 2 x 2 coefficients belong to the sample, and the backward is the same
// thing with the matrix transposed: one kernel, `mix`. A tile of kTile elements of one sample is owned by one thread and
// stays in the first-level cache: each operand is read once, the noise is drawn into the tile, each output written once.
#include "common/operand.h"
#include "common/timesteps.h"

namespace fastgen {
namespace {

constexpr std::int64_t kTile = 1024;  // two operands, the normals and two outputs of 4 KB fit 32 KB

// An output u_part * u + w_part * w; a part that is not there takes nothing, not even a NaN.
struct Output {
  bool takes_u = false, takes_w = false;
  std::vector<double> u_part, w_part;  // one a sample
  void* data = nullptr;                // null: not wanted
};

struct Mix {
  Operand u, w;
  SeededNormals normals;  // in place of w
  Output outputs[2];
  std::int64_t samples = 0, size = 0;
};

template <class T>
void run_tile(const Mix& m, std::int64_t n, std::int64_t offset, std::int64_t count, Scratch<opmath_t<T>>& scratch,
              Scratch<float>& normals) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const std::int64_t at_all = n * m.size + offset;
  const A* u = m.u.data ? m.u.tile<A>(at_all, count, scratch[0]) : nullptr;
  const A* w = m.normals.seeds ? m.normals.tile<A>(n, offset, count, normals[0], scratch[1])
               : m.w.data      ? m.w.tile<A>(at_all, count, scratch[1])
                               : nullptr;
  for (const Output& output : m.outputs) {
    if (!output.data) continue;
    T* out = static_cast<T*>(output.data) + at_all;
    const V u_part(static_cast<A>(output.u_part[n])), w_part(static_cast<A>(output.w_part[n]));
    if (u && w && output.takes_u && output.takes_w) {
      for_vectors<A>(count, [&](std::int64_t i, auto at) {
        at.store(out + i, madd<A>(u_part, at.load(u + i), w_part * at.load(w + i)));
      });
    } else {
      const A* only = output.takes_u && u ? u : output.takes_w ? w : nullptr;
      const V part = only == u ? u_part : w_part;
      for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(out + i, only ? V(part * at.load(only + i)) : V(A(0))); });
    }
  }
}

template <class T>
void run(const Mix& m) {
  const std::int64_t tile = m.normals.tile_size(kTile), tiles = (m.size + tile - 1) / tile;
  parallel(m.samples * tiles, m.samples * m.size * (m.normals.seeds ? kNormalWork : 1), [&](std::int64_t begin, std::int64_t end) {
    Scratch<opmath_t<T>> scratch(2, tile);
    Scratch<float> normals(m.normals.seeds ? 1 : 0, tile);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t offset = item % tiles * tile;
      run_tile<T>(m, item / tiles, offset, std::min(tile, m.size - offset), scratch, normals);
    }
  });
}

// The coefficients of every sample: rows (x_t, target) over columns (x0, epsilon), transposed for the backward. `target` is an
// index of PREDICTION_TYPES, or negative for none.
void fill_coefficients(Mix& m, const Tensor& t, const Tensor& alphas, const Tensor& sigmas, std::int64_t target, bool transposed) {
  FASTGEN_CHECK(target >= -1 && target < kNumPredictions, "q_sample: target must be -1 or an index of PREDICTION_TYPES, got ", target);
  const Timesteps timesteps("q_sample", t, m.samples, alphas);
  const auto alpha = timesteps.read("alphas", alphas), sigma = timesteps.read("sigmas", sigmas);
  const auto set = [&](int row, int column, bool taken, std::int64_t n, double value) {
    Output& output = m.outputs[transposed ? column : row];
    const bool is_u = (transposed ? row : column) == 0;
    (is_u ? output.takes_u : output.takes_w) = taken;
    (is_u ? output.u_part : output.w_part)[n] = value;
  };
  for (Output& output : m.outputs) output.u_part.resize(m.samples), output.w_part.resize(m.samples);
  for (std::int64_t n = 0; n < m.samples; ++n) {
    set(0, 0, true, n, alpha[n]);
    set(0, 1, true, n, sigma[n]);
    if (target < 0) continue;
    const TargetParts parts = target_parts(static_cast<Prediction>(target), alpha[n], sigma[n]);
    set(1, 0, parts.takes_x0, n, parts.x0_part);
    set(1, 1, parts.takes_noise, n, parts.noise_part);
  }
}

std::tuple<Tensor, Tensor> q_sample_fwd(const Tensor& x0, const Tensor& t, const Tensor& alphas, const Tensor& sigmas,
                                        OptionalTensor noise, OptionalTensor seeds, std::int64_t step, std::int64_t target) {
  FASTGEN_CHECK(x0.dim() >= 1, "q_sample: x0 must be [N, *]");
  FASTGEN_CHECK(noise.has_value() != seeds.has_value(), "q_sample: give either noise or seeds");
  const bool channels_last = is_channels_last(x0);
  const auto sizes = sizes_of(x0);
  Operands operands("q_sample", channels_last);
  Mix m;
  m.samples = sizes[0];
  m.size = m.samples == 0 ? 0 : x0.numel() / m.samples;
  m.u = operands("x0", x0, "x0", sizes);
  if (noise) m.w = operands("noise", *noise, "x0", sizes);
  if (seeds) m.normals = SeededNormals("q_sample", *seeds, step, x0, channels_last);
  fill_coefficients(m, t, alphas, sigmas, target, false);
  const auto fresh = [&](Output& output) {
    Tensor out = empty_dense(x0, channels_last, x0.scalar_type());
    output.data = out.mutable_data_ptr();
    return out;
  };
  Tensor x_t = fresh(m.outputs[0]);
  Tensor second = target < 0 ? empty_contiguous({0}, x0.scalar_type()) : fresh(m.outputs[1]);
  dispatch_dtype("q_sample", x0.scalar_type(), [&]<class T>() { run<T>(m); });
  return {x_t, second};
}

std::tuple<Tensor, Tensor> q_sample_bwd(OptionalTensor grad, OptionalTensor grad_target, const Tensor& t, const Tensor& alphas,
                                        const Tensor& sigmas, std::int64_t target, bool wants_x0, bool wants_noise) {
  FASTGEN_CHECK(grad.has_value() || grad_target.has_value(), "q_sample: there is no gradient to take back");
  const Tensor like = grad ? *grad : *grad_target;
  FASTGEN_CHECK(like.dim() >= 1, "q_sample: gradients must be [N, *]");
  const bool channels_last = is_channels_last(like);
  const auto sizes = sizes_of(like);
  Operands operands("q_sample", channels_last);
  Mix m;
  m.samples = sizes[0];
  m.size = m.samples == 0 ? 0 : like.numel() / m.samples;
  if (grad) m.u = operands("grad", *grad, "grad", sizes);
  if (grad_target) m.w = operands("grad_target", *grad_target, "grad", sizes);
  fill_coefficients(m, t, alphas, sigmas, target, true);
  const auto fresh = [&](Output& output, bool wanted) {
    if (!wanted) return empty_contiguous({0}, like.scalar_type());
    Tensor out = empty_dense(like, channels_last, like.scalar_type());
    output.data = out.mutable_data_ptr();
    return out;
  };
  Tensor grad_x0 = fresh(m.outputs[0], wants_x0), grad_noise = fresh(m.outputs[1], wants_noise);
  dispatch_dtype("q_sample", like.scalar_type(), [&]<class T>() { run<T>(m); });
  return {grad_x0, grad_noise};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("q_sample_fwd", TORCH_BOX(&fastgen::q_sample_fwd));
  m.impl("q_sample_bwd", TORCH_BOX(&fastgen::q_sample_bwd));
}
