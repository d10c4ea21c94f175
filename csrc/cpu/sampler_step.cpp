// sampler_step: one row of a coefficient table applied to a sample, whatever the solver.
//
// A tile of kTile elements of one sample is owned by one thread and stays in the first-level cache: each operand is read
// once (and widened, if it has another dtype), the noise is drawn into the tile, the result is written once. Elements are
// independent, so tiles may be cut anywhere; the normals are indexed by logical (contiguous) element in either layout.
#include "common/memory.h"
#include "common/operand.h"

namespace fastgen {
namespace {

constexpr std::int64_t kTile = 1024;  // five operands of 4 KB fit 32 KB

// The columns of a table, in the order of COLUMNS in fastgen/_schema.py.
enum Column {
  kSample, kPrediction, kModel, kNoise, kPredictionSample, kPredictionModel, kClipMin, kClipMax, kGuidanceScale,
  kOutputSample, kOutputPrediction, kOutputModel, kCorrectedSample, kCorrectedPrediction, kCorrectedModel, kLogNoise,
  kLogNoiseSlope, kKnown, kKnownNoise, kNumColumns
};  // clang-format off

struct Step {
  Operand sample, model, uncond, noise, variance, mask, known, known_noise;
  std::vector<Operand> history;
  std::vector<double> inverse_threshold;  // one a sample, or empty
  SeededNormals normals;
  std::int64_t samples = 1, size = 0;  // elements of a sample; of all together where samples are all alike
  void* out = nullptr;
  void* prediction = nullptr;
  void* corrected = nullptr;
};

template <class T>
void run_tile(const Step& s, const std::vector<double>& row, std::int64_t n, std::int64_t offset, std::int64_t count,
              Scratch<opmath_t<T>>& scratch, Scratch<float>& normals) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const auto coefficient = [&](int column) { return static_cast<A>(row[column]); };
  const std::int64_t at_all = n * s.size + offset;
  T* out = static_cast<T*>(s.out) + at_all;
  T* prediction = s.prediction ? static_cast<T*>(s.prediction) + at_all : nullptr;
  T* corrected = s.corrected ? static_cast<T*>(s.corrected) + at_all : nullptr;
  A *acc = scratch[0], *acc_corrected = scratch[10];
  if constexpr (std::is_same_v<T, A>) acc = out, acc_corrected = corrected;
  const bool last_pass_writes = !std::is_same_v<T, A>;

  const A* x = s.sample.tile<A>(at_all, count, scratch[1]);
  const A* model = s.model.tile<A>(at_all, count, scratch[2]);
  const A* uncond = s.uncond.data ? s.uncond.tile<A>(at_all, count, scratch[3]) : nullptr;
  {
    const V a(coefficient(kSample)), b(coefficient(kPrediction)), d(coefficient(kModel)), w(coefficient(kGuidanceScale));
    const V px(coefficient(kPredictionSample)), pm(coefficient(kPredictionModel));
    const V low(coefficient(kClipMin)), high(coefficient(kClipMax));
    const V qx(coefficient(kOutputSample)), qp(coefficient(kOutputPrediction)), qm(coefficient(kOutputModel));
    const V rx(coefficient(kCorrectedSample)), rp(coefficient(kCorrectedPrediction)), rm(coefficient(kCorrectedModel));
    const V scale(s.inverse_threshold.empty() ? A(1) : static_cast<A>(s.inverse_threshold[n]));
    // A coefficient of 0 takes nothing: an infinite model output that the clip tames must not come back as 0 * Inf.
    const auto take = [](bool takes, V term) { return takes ? term : V(A(0)); };
    const bool model_taken = row[kModel] != 0, output_taken = row[kOutputModel] != 0, corrected_taken = row[kCorrectedModel] != 0;
    for_vectors<A>(count, [&](std::int64_t i, auto at) {
      const V xi = at.load(x + i);
      V g = at.load(model + i);
      if (uncond) {
        const V u = at.load(uncond + i);
        g = madd<A>(w, g - u, u);
      }
      V p = madd<A>(px, xi, pm * g) * scale;
      stdx::where(p < low, p) = low;  // a NaN passes both
      stdx::where(p > high, p) = high;
      if (prediction) at.store(prediction + i, madd<A>(qx, xi, madd<A>(qp, p, take(output_taken, qm * g))));
      if (corrected) at.store(acc_corrected + i, madd<A>(rx, xi, madd<A>(rp, p, take(corrected_taken, rm * g))));
      at.store(acc + i, madd<A>(a, xi, madd<A>(b, p, take(model_taken, d * g))));
    });
  }
  for (std::size_t k = 0; k < s.history.size(); ++k) {
    const V c(coefficient(kNumColumns + static_cast<int>(k)));
    const A* h = s.history[k].tile<A>(at_all, count, scratch[4]);
    for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(acc + i, madd<A>(c, at.load(h + i), at.load(acc + i))); });
    if (!corrected) continue;
    const V e(coefficient(kNumColumns + static_cast<int>(s.history.size() + k)));
    for_vectors<A>(count, [&](std::int64_t i, auto at) {
      at.store(acc_corrected + i, madd<A>(e, at.load(h + i), at.load(acc_corrected + i)));
    });
  }
  if (s.noise.data || s.normals.seeds) {
    const A* noise = s.normals.seeds ? s.normals.tile<A>(n, offset, count, normals[0], scratch[5])
                                     : s.noise.tile<A>(at_all, count, scratch[5]);
    const A* v = s.variance.data ? s.variance.tile<A>(at_all, count, scratch[6]) : nullptr;
    const V std(coefficient(kNoise)), log_std(coefficient(kLogNoise)), slope(coefficient(kLogNoiseSlope));
    for_vectors<A>(count, [&](std::int64_t i, auto at) {
      V factor = std;
      if (v) factor *= exp(madd<A>(slope, at.load(v + i), log_std));
      at.store(acc + i, madd<A>(factor, at.load(noise + i), at.load(acc + i)));
    });
  }
  if (s.mask.data) {
    const A* mask = s.mask.tile<A>(at_all, count, scratch[7]);
    const A* known = s.known.tile<A>(at_all, count, scratch[8]);
    const A* known_noise = s.known_noise.data ? s.known_noise.tile<A>(at_all, count, scratch[9]) : nullptr;
    const V k(coefficient(kKnown)), k_noise(coefficient(kKnownNoise));
    for_vectors<A>(count, [&](std::int64_t i, auto at) {
      V keep = k * at.load(known + i);
      if (known_noise) keep = madd<A>(k_noise, at.load(known_noise + i), keep);
      at.store(acc + i, madd<A>(at.load(mask + i), at.load(acc + i) - keep, keep));
    });
  }
  if (!last_pass_writes) return;
  for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(out + i, at.load(acc + i)); });
  if (corrected) for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(corrected + i, at.load(acc_corrected + i)); });
}

template <class T>
void run(const Step& s, const std::vector<double>& row) {
  const std::int64_t size = s.size, tile = s.normals.tile_size(kTile);
  const std::int64_t tiles = (size + tile - 1) / tile;
  const std::int64_t work = s.samples * size * (s.normals.seeds ? kNormalWork : 1);
  parallel(s.samples * tiles, work, [&](std::int64_t begin, std::int64_t end) {
    Scratch<opmath_t<T>> scratch(11, tile);
    Scratch<float> normals(s.normals.seeds ? 1 : 0, tile);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t offset = item % tiles * tile;
      run_tile<T>(s, row, item / tiles, offset, std::min(tile, size - offset), scratch, normals);
    }
  });
}

std::vector<double> read_row(const Tensor& table, std::int64_t step, std::size_t history) {
  check_floating("sampler_step", "table", table);
  FASTGEN_CHECK(table.dim() == 2 && step >= 0 && step < table.size(0), "sampler_step: step ", step, " is not a row of the table");
  const std::int64_t columns = kNumColumns + static_cast<std::int64_t>(history);
  FASTGEN_CHECK(table.size(1) >= columns, "sampler_step: the table needs ", columns, " columns, it has ", table.size(1));
  std::vector<double> row(columns);
  dispatch_dtype("sampler_step", table.scalar_type(), [&]<class T>() {
    const T* p = static_cast<const T*>(table.data_ptr()) + step * table.stride(0);
    for (std::int64_t i = 0; i < columns; ++i) row[i] = widen(p[i * table.stride(1)]);
  });
  return row;
}

std::vector<double> read_inverses(const Tensor& threshold, std::int64_t samples) {
  check_floating("sampler_step", "threshold", threshold);
  FASTGEN_CHECK(threshold.dim() == 1 && threshold.size(0) == samples, "sampler_step: threshold must be one per sample");
  std::vector<double> inverses(samples);
  dispatch_dtype("sampler_step", threshold.scalar_type(), [&]<class T>() {
    const T* p = static_cast<const T*>(threshold.data_ptr());
    for (std::int64_t i = 0; i < samples; ++i) inverses[i] = 1.0 / static_cast<double>(widen(p[i * threshold.stride(0)]));
  });
  return inverses;
}

void check_sample(const Tensor& sample) {
  check_floating("sampler_step", "sample", sample);
  FASTGEN_CHECK(sample.dim() >= 1, "sampler_step: sample must be [N, *], got a scalar");
}

// Writes into `out` and, where they are given, `prediction` and `corrected`. An element of sample, model_output and uncond is read
// before any output of it is written, one of the other operands after.
void write_step(
    const Tensor& sample, const Tensor& model_output, const Tensor& table, std::int64_t step, OptionalTensor uncond,
    std::vector<Tensor> history, OptionalTensor noise, OptionalTensor seeds, OptionalTensor variance, OptionalTensor mask,
    OptionalTensor known, OptionalTensor known_noise, OptionalTensor threshold, Tensor out, OptionalTensor prediction,
    OptionalTensor corrected) {
  check_sample(sample);
  const auto sizes = sizes_of(sample);
  const ScalarType dtype = sample.scalar_type();
  Step s;
  const bool channels_last = is_channels_last(sample);
  Operands operands("sampler_step", channels_last);
  const auto operand = [&](const char* name, const Tensor& t) { return operands(name, t, "sample", sizes); };
  const auto optional = [&](const char* name, const OptionalTensor& t) { return t ? operand(name, *t) : Operand{}; };
  s.sample = operand("sample", sample);
  s.model = operand("model_output", model_output);
  s.uncond = optional("uncond", uncond);
  s.noise = optional("noise", noise);
  s.variance = optional("variance", variance);
  FASTGEN_CHECK(mask.has_value() == known.has_value(), "sampler_step: mask and known come together");
  s.mask = optional("mask", mask);
  s.known = optional("known", known);
  s.known_noise = optional("known_noise", known_noise);
  for (const Tensor& h : history) s.history.push_back(operand("history", h));

  s.size = sample.numel();
  if (seeds) s.normals = SeededNormals("sampler_step", *seeds, step, sample, channels_last);
  if (threshold) s.inverse_threshold = read_inverses(*threshold, sizes[0]);
  if (seeds || threshold) {
    s.samples = sizes[0];
    s.size = s.samples == 0 ? 0 : sample.numel() / s.samples;
  }
  const auto row = read_row(table, step, corrected ? 2 * history.size() : history.size());

  std::vector<std::pair<Tensor, Tensor>> copies;  // (what the caller gave, dense memory that stands for it)
  const auto output = [&](const char* name, const Tensor& t) {
    FASTGEN_CHECK(sizes_of(t) == sizes && t.scalar_type() == dtype, "sampler_step: ", name,
                  " must have the shape and dtype of sample");
    Tensor dense = t;
    if (!is_dense(t, channels_last)) copies.emplace_back(t, dense = empty_dense(sample, channels_last, dtype));
    return dense.mutable_data_ptr();
  };
  s.out = output("out", out);
  if (prediction) s.prediction = output("prediction", *prediction);
  if (corrected) s.corrected = output("corrected", *corrected);
  dispatch_dtype("sampler_step", dtype, [&]<class T>() { run<T>(s, row); });
  for (auto& [given, dense] : copies) torch::stable::copy_(given, dense);
}

void sampler_step_out(
    const Tensor& sample, const Tensor& model_output, const Tensor& table, std::int64_t step, OptionalTensor uncond,
    std::vector<Tensor> history, OptionalTensor noise, OptionalTensor seeds, OptionalTensor variance, OptionalTensor mask,
    OptionalTensor known, OptionalTensor known_noise, OptionalTensor threshold, Tensor out, OptionalTensor prediction,
    OptionalTensor corrected) {
  Written written("sampler_step");
  written.add("out", out);
  if (prediction) written.add("prediction", *prediction);
  if (corrected) written.add("corrected", *corrected);
  written.read_first("sample", sample);
  written.read_first("model_output", model_output);
  if (uncond) written.read_first("uncond", *uncond);
  written.read_later("table", table);
  const auto later = [&](const char* name, const OptionalTensor& t) {
    if (t) written.read_later(name, *t);
  };
  later("noise", noise), later("seeds", seeds), later("variance", variance), later("mask", mask), later("known", known);
  later("known_noise", known_noise), later("threshold", threshold);
  written.read_later("history", history);
  write_step(sample, model_output, table, step, uncond, std::move(history), noise, seeds, variance, mask, known, known_noise,
             threshold, out, prediction, corrected);
}

std::tuple<Tensor, Tensor, Tensor> sampler_step_fwd(
    const Tensor& sample, const Tensor& model_output, const Tensor& table, std::int64_t step, OptionalTensor uncond,
    std::vector<Tensor> history, OptionalTensor noise, OptionalTensor seeds, OptionalTensor variance, OptionalTensor mask,
    OptionalTensor known, OptionalTensor known_noise, OptionalTensor threshold, bool return_prediction, bool return_corrected) {
  check_sample(sample);
  const bool channels_last = is_channels_last(sample);
  const auto fresh = [&] { return empty_dense(sample, channels_last, sample.scalar_type()); };
  Tensor out = fresh();
  OptionalTensor prediction, corrected;
  if (return_prediction) prediction = fresh();
  if (return_corrected) corrected = fresh();
  write_step(sample, model_output, table, step, uncond, std::move(history), noise, seeds, variance, mask, known, known_noise,
             threshold, out, prediction, corrected);
  const auto or_empty = [&](const OptionalTensor& t) { return t ? *t : empty_contiguous({0}, sample.scalar_type()); };
  return {out, or_empty(prediction), or_empty(corrected)};
}

// A step as fastgen/ops/_sampler_step_direct.py packs it: operands of one dtype whose elements lie one after the other.
struct DirectStep {
  std::int64_t dtype;  // its place among float64, float32, bfloat16, float16
  std::int64_t elements;
  const void* row;  // float64 for a float64 step, else float32
  const void *sample, *model, *noise;
  void *out, *prediction, *corrected;
  std::int64_t n_history;
  const void* history[];
};

}  // namespace

// `sampler_step_out` for a caller who has checked what that checks.
extern "C" [[gnu::visibility("default")]] void fastgen_sampler_step(const DirectStep* given) {
  constexpr ScalarType dtypes[] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const ScalarType dtype = dtypes[given->dtype];
  const auto operand = [&](const void* data) { return Operand{"sampler_step", data, dtype}; };
  Step s;
  s.sample = operand(given->sample), s.model = operand(given->model), s.noise = operand(given->noise);
  for (std::int64_t k = 0; k < given->n_history; ++k) s.history.push_back(operand(given->history[k]));
  s.out = given->out, s.prediction = given->prediction, s.corrected = given->corrected;
  s.size = given->elements;
  std::vector<double> row(kNumColumns + (s.corrected ? 2 : 1) * given->n_history);
  for (std::size_t i = 0; i < row.size(); ++i)
    row[i] = dtype == ScalarType::Double ? static_cast<const double*>(given->row)[i] : static_cast<const float*>(given->row)[i];
  dispatch_dtype("sampler_step", dtype, [&]<class T>() { run<T>(s, row); });
}

}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("sampler_step_fwd", TORCH_BOX(&fastgen::sampler_step_fwd));
  m.impl("sampler_step_out", TORCH_BOX(&fastgen::sampler_step_out));
}
