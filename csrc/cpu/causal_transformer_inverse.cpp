// causal_transformer_inverse: token after token of an autoregressive affine map whose parameters a causal transformer gives.
//
// A thread owns images and takes some of them at a time through all tokens, so no thread waits for another. A token goes through the
// layers for all that go together: each weight is read once a token for them, and that, or the multiply-adds, is what a token costs. So
// many go together as keep their keys and values near, but kFewest where there are that many, so that a weight is used often enough.
// With guidance a row without the condition follows that with it, with keys and values of its own. Sums do not depend on which images go
// together, and so not on threads.
#include "causal_transformer_inverse.h"

#include <vector>

#include "common/scratch.h"
#include "common/tensor.h"

namespace fastgen::causal_transformer_inverse {
namespace {

constexpr const char* kOp = "causal_transformer_inverse";
// Bytes of the keys and values of images that go together; 1 to 4 MB are alike and 12 take 1.16 times as long (100 images of 49 tokens of
// 128 channels in 4 layers, one busy EPYC core with 1 MB of second-level cache; 2026-12).
constexpr std::int64_t kCacheBytes = 3 << 20;
constexpr std::int64_t kFewest = 16;            // rows that go together at least, where there are so many: weights are read for all of them
constexpr std::int64_t kLayerMatrices = 4, kLayerParameters = 8;

template <class A>
struct Layer {
  const A *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  Matrix<A> qkv, proj, up, down;
};

struct Sizes {
  std::int64_t images, tokens, features, channels, heads, layers;
  std::int64_t hidden = 0, outputs = 0;  // hidden: the widest
  std::int64_t streams = 1;              // 2 with guidance

  std::int64_t depth() const { return channels / heads; }
  std::int64_t wide() const { return round_up(std::max({3 * channels, hidden, outputs}), kPanel); }
  std::int64_t stride() const { return round_up(channels, kPanel); }
};

template <class A>
struct Problem {
  Sizes sizes;
  Matrix<A> in, out;
  std::vector<Layer<A>> layers;
  const A *position, *condition = nullptr, *unconditional = nullptr;  // [T, C], [N, C], [C]
  const double* guidance = nullptr;                                   // [T, 2]
  double eps;
  A scale, unconditional_scale;  // of the scores
};

// Memory of a thread: of R rows, the images with their condition and then, with guidance, without.
template <class A>
class Images {
 public:
  Images(const Problem<A>& problem, std::int64_t most)
      : p(problem), s(problem.sizes), rows_(most * s.streams), head_size_(Head<A>::size(s.tokens, s.depth())),
        cache_(rows_ * s.layers * s.heads * head_size_), x_(rows_ * s.stride()), narrow_(rows_ * s.stride()), wide_(rows_ * s.wide()),
        scores_(round_up(s.tokens, kPanel)) {}

  // Images [first, first + count): `data` [N, T, D] holds what is inverted and, in its place, what comes of it.
  void run(std::int64_t first, std::int64_t count, A* data, A* log_det) {
    const std::int64_t rows = count * s.streams;
    std::vector<double> sums(static_cast<std::size_t>(count));
    for (std::int64_t token = 0; token + 1 < s.tokens; ++token) {
      embed(first, count, token, data);
      for (std::int64_t l = 0; l < s.layers; ++l) layer(p.layers[static_cast<std::size_t>(l)], l, rows, count, token);
      multiply(p.out, x_.get(), s.stride(), rows, wide_.get(), s.wide());
      for (std::int64_t n = 0; n < count; ++n) sums[static_cast<std::size_t>(n)] += affine(n, count, token + 1, data + (first + n) * s.tokens * s.features);
    }
    for (std::int64_t n = 0; n < count; ++n) log_det[first + n] = static_cast<A>(sums[static_cast<std::size_t>(n)]);
  }

 private:
  A* x(std::int64_t row) const { return x_.get() + row * s.stride(); }
  A* narrow(std::int64_t row) const { return narrow_.get() + row * s.stride(); }
  Head<A> head(std::int64_t row, std::int64_t layer, std::int64_t head) const {
    return {cache_.get() + ((row * s.layers + layer) * s.heads + head) * head_size_, s.tokens, s.depth()};
  }
  A* wide(std::int64_t row) const { return wide_.get() + row * s.wide(); }

  // x = in(token) + position + condition, and the same without the condition.
  void embed(std::int64_t first, std::int64_t count, std::int64_t token, const A* data) {
    multiply(p.in, data + (first * s.tokens + token) * s.features, s.tokens * s.features, count, narrow_.get(), s.stride());
    const A* const position = p.position + token * s.channels;
    for (std::int64_t n = 0; n < count; ++n) {
      const A *const from = narrow(n), *const condition = p.condition ? p.condition + (first + n) * s.channels : nullptr;
      A *const to = x(n), *const without = s.streams == 2 ? x(count + n) : nullptr;
      for_vectors<A>(s.channels, [&](std::int64_t i, auto at) {
        const Vec<A> sum = at.load(from + i) + at.load(p.in.bias + i) + at.load(position + i);
        at.store(to + i, condition ? sum + at.load(condition + i) : sum);
        if (without) at.store(without + i, p.unconditional ? sum + at.load(p.unconditional + i) : sum);
      });
    }
  }

  void layer(const Layer<A>& l, std::int64_t number, std::int64_t rows, std::int64_t conditional, std::int64_t token) {
    for (std::int64_t r = 0; r < rows; ++r) layer_norm(x(r), l.norm1_weight, l.norm1_bias, s.channels, p.eps, narrow(r));
    multiply(l.qkv, narrow_.get(), s.stride(), rows, wide_.get(), s.wide());
    for (std::int64_t r = 0; r < rows; ++r) {
      A *const query = wide(r), *const key = query + s.channels, *const value = key + s.channels;
      for_vectors<A>(3 * s.channels, [&](std::int64_t i, auto at) { at.store(query + i, at.load(query + i) + at.load(l.qkv.bias + i)); });
      for (std::int64_t h = 0; h < s.heads; ++h) {
        const Head<A> here = head(r, number, h), next = h + 1 < s.heads ? head(r, number, h + 1) : head(std::min(r + 1, rows - 1), number, 0);
        const std::int64_t at = h * s.depth();
        here.append(token, key + at, value + at);
        attend(here, next, token + 1, query + at, r < conditional ? p.scale : p.unconditional_scale, scores_.get(), narrow(r) + at);
      }
    }
    multiply(l.proj, narrow_.get(), s.stride(), rows, wide_.get(), s.wide());
    for (std::int64_t r = 0; r < rows; ++r) {
      add(wide(r), l.proj.bias, x(r));
      layer_norm(x(r), l.norm2_weight, l.norm2_bias, s.channels, p.eps, narrow(r));
    }
    multiply(l.up, narrow_.get(), s.stride(), rows, wide_.get(), s.wide());
    for (std::int64_t r = 0; r < rows; ++r)
      for_vectors<A>(l.up.outputs, [&, hidden = wide(r)](std::int64_t i, auto at) {
        at.store(hidden + i, gelu<A, Gelu::kNone>(at.load(hidden + i) + at.load(l.up.bias + i)));
      });
    multiply(l.down, wide_.get(), s.wide(), rows, narrow_.get(), s.stride());
    for (std::int64_t r = 0; r < rows; ++r) add(narrow(r), l.down.bias, x(r));
  }

  // x += product + bias
  void add(const A* product, const A* bias, A* x) const {
    for_vectors<A>(s.channels, [&](std::int64_t i, auto at) { at.store(x + i, at.load(x + i) + (at.load(product + i) + at.load(bias + i))); });
  }

  // token of image n: z exp(a) + b, where (a, b) is what the network said; returns the sum of a.
  double affine(std::int64_t n, std::int64_t count, std::int64_t token, A* image) {
    A *const said = wide(n), *const z = image + token * s.features;
    const A* const without = s.streams == 2 ? wide(count + n) : nullptr;
    const bool scaled = s.outputs == 2 * s.features;
    double sum = 0;
    for (std::int64_t i = 0; i < s.outputs; ++i) {
      A value = said[i] + p.out.bias[i];
      if (without != nullptr) {
        const auto weight = static_cast<A>(p.guidance[token * 2 + (scaled && i < s.features ? 0 : 1)]);
        value += weight * (value - (without[i] + p.out.bias[i]));
      }
      said[i] = value;
    }
    const A* const shift = said + (scaled ? s.features : 0);
    for (std::int64_t i = 0; scaled && i < s.features; ++i) sum += said[i];
    for_vectors<A>(s.features, [&](std::int64_t i, auto at) {
      Vec<A> value = at.load(z + i);
      if (scaled) {  // libm's: of any number, and of few
        const Vec<A> a = at.load(said + i);
        value *= Vec<A>([&](auto lane) { return std::exp(static_cast<A>(a[lane])); });
      }
      at.store(z + i, value + at.load(shift + i));
    });
    return sum;
  }

  const Problem<A>& p;
  const Sizes& s;
  std::int64_t rows_, head_size_;
  Scratch<A> cache_, x_, narrow_, wide_, scores_;
};

template <class A>
void invert(const Problem<A>& p, A* data, A* log_det) {
  const Sizes& s = p.sizes;
  const std::int64_t bytes = s.streams * s.layers * s.heads * Head<A>::size(s.tokens, s.depth()) * static_cast<std::int64_t>(sizeof(A));
  const std::int64_t most = std::max({kCacheBytes / std::max<std::int64_t>(bytes, 1), ceil_div(kFewest, s.streams), std::int64_t(1)});
  parallel(s.images, s.images * s.tokens * s.channels * s.channels, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t groups = ceil_div(end - begin, most), together = ceil_div(end - begin, groups);
    Images<A> images(p, together);
    for (std::int64_t first = begin; first < end; first += together) images.run(first, std::min(together, end - first), data, log_det);
  });
}

// ---- what comes in --------------------------------------------------------------------------------------------------------------

// Hands out the matrices and the parameters in order, each checked.
template <class A>
class Reader {
 public:
  Reader(const std::vector<Tensor>& weights, const std::vector<Tensor>& parameters, ScalarType dtype)
      : weights_(weights), parameters_(parameters), dtype_(dtype) {}

  const A* vector(std::int64_t count) {
    const Tensor& t = parameters_[next_parameter_++];
    FASTGEN_CHECK(t.scalar_type() == dtype_ && t.dim() == 1 && t.size(0) == count && t.is_contiguous(), kOp, ": parameters[",
                  next_parameter_ - 1, "] must be contiguous [", count, "] in the dtype of input");
    return static_cast<const A*>(t.data_ptr());
  }
  std::int64_t next_length() const { return parameters_[next_parameter_].dim() == 1 ? parameters_[next_parameter_].size(0) : -1; }
  Matrix<A> matrix(std::int64_t channels, std::int64_t outputs) {
    const Tensor& t = weights_[next_weight_++];
    FASTGEN_CHECK(t.scalar_type() == dtype_ && (sizes_of(t) == std::vector{ceil_div(outputs, kPanel), channels, kPanel}) && t.is_contiguous(),
                  kOp, ": weights[", next_weight_ - 1, "] must be packed, for ", outputs, " outputs of ", channels,
                  " channels, in the dtype of input");
    return {static_cast<const A*>(t.data_ptr()), vector(outputs), channels, outputs};
  }

 private:
  const std::vector<Tensor>&weights_, &parameters_;
  ScalarType dtype_;
  std::size_t next_weight_ = 0, next_parameter_ = 0;
};

void check_like(const char* name, const Tensor& t, const std::vector<std::int64_t>& sizes, ScalarType dtype) {
  FASTGEN_CHECK(t.scalar_type() == dtype && sizes_of(t) == sizes && t.is_contiguous(), kOp, ": ", name,
                " must be contiguous, of the sizes and the dtype that input says");
}

template <class A>
Problem<A> read(const Tensor& input, const Tensor& position, const OptionalTensor& condition, const OptionalTensor& unconditional,
                const OptionalTensor& guidance, const std::vector<Tensor>& weights, const std::vector<Tensor>& parameters,
                std::int64_t heads, double eps, double unconditional_temperature) {
  const ScalarType dtype = input.scalar_type();
  FASTGEN_CHECK(position.dim() == 2 && position.size(1) >= 1, kOp, ": position must be [T, C]");
  const std::int64_t layers = (static_cast<std::int64_t>(weights.size()) - 2) / kLayerMatrices;
  FASTGEN_CHECK(weights.size() >= 2 && static_cast<std::int64_t>(weights.size()) == 2 + kLayerMatrices * layers &&
                    static_cast<std::int64_t>(parameters.size()) == 2 + kLayerParameters * layers,
                kOp, ": weights must be 2 + 4 L tensors and parameters 2 + 8 L, got ", weights.size(), " and ", parameters.size());
  Problem<A> p{};
  Sizes& s = p.sizes;
  s.images = input.size(0), s.tokens = input.size(1), s.features = input.size(2), s.channels = position.size(1);
  s.heads = heads, s.layers = layers;
  FASTGEN_CHECK(heads >= 1 && s.channels % heads == 0, kOp, ": heads must divide C = ", s.channels, ", got ", heads);
  check_like("position", position, {s.tokens, s.channels}, dtype);
  p.position = static_cast<const A*>(position.data_ptr());
  if (condition.has_value()) {
    check_like("condition", *condition, {s.images, s.channels}, dtype);
    p.condition = static_cast<const A*>(condition->data_ptr());
  }
  if (unconditional.has_value()) {
    check_like("unconditional", *unconditional, {s.channels}, dtype);
    p.unconditional = static_cast<const A*>(unconditional->data_ptr());
  }
  if (guidance.has_value()) {
    check_like("guidance", *guidance, {s.tokens, 2}, ScalarType::Double);
    p.guidance = static_cast<const double*>(guidance->data_ptr());
    s.streams = 2;
  }
  FASTGEN_CHECK(unconditional_temperature > 0, kOp, ": unconditional_temperature must be positive, got ", unconditional_temperature);
  p.eps = eps;
  p.scale = static_cast<A>(1 / std::sqrt(static_cast<double>(s.depth())));
  p.unconditional_scale = static_cast<A>(1 / std::sqrt(static_cast<double>(s.depth())) / unconditional_temperature);
  Reader<A> reader(weights, parameters, dtype);
  p.in = reader.matrix(s.features, s.channels);
  for (std::int64_t l = 0; l < layers; ++l) {
    Layer<A> layer{};
    layer.norm1_weight = reader.vector(s.channels), layer.norm1_bias = reader.vector(s.channels);
    layer.qkv = reader.matrix(s.channels, 3 * s.channels);
    layer.proj = reader.matrix(s.channels, s.channels);
    layer.norm2_weight = reader.vector(s.channels), layer.norm2_bias = reader.vector(s.channels);
    const std::int64_t hidden = reader.next_length();
    FASTGEN_CHECK(hidden >= 1, kOp, ": the bias of a layer's hidden units must be [H]");
    layer.up = reader.matrix(s.channels, hidden);
    layer.down = reader.matrix(hidden, s.channels);
    s.hidden = std::max(s.hidden, hidden);
    p.layers.push_back(layer);
  }
  s.outputs = reader.next_length();
  FASTGEN_CHECK(s.outputs == s.features || s.outputs == 2 * s.features, kOp, ": the last matrix must give D or 2 D = ", 2 * s.features,
                " numbers, got ", s.outputs);
  p.out = reader.matrix(s.channels, s.outputs);
  return p;
}

std::tuple<Tensor, Tensor> causal_transformer_inverse(const Tensor& input, const Tensor& position, OptionalTensor condition,
                                                      OptionalTensor unconditional, OptionalTensor guidance, std::vector<Tensor> weights,
                                                      std::vector<Tensor> parameters, std::int64_t heads, double eps,
                                                      double unconditional_temperature) {
  FASTGEN_CHECK(input.dim() == 3 && input.size(2) >= 1, kOp, ": input must be [N, T, D] with D >= 1");
  const ScalarType dtype = input.scalar_type();
  FASTGEN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp, ": input must be float32 or float64");
  Tensor output = copy_dense(input, false), log_det = empty_contiguous({input.size(0)}, dtype);
  const auto run = [&]<class A>() {
    const Problem<A> p =
        read<A>(input, position, condition, unconditional, guidance, weights, parameters, heads, eps, unconditional_temperature);
    A* const sums = static_cast<A*>(log_det.mutable_data_ptr());
    std::fill_n(sums, p.sizes.images, A(0));
    if (p.sizes.images > 0 && p.sizes.tokens > 1) invert<A>(p, static_cast<A*>(output.mutable_data_ptr()), sums);
  };
  if (dtype == ScalarType::Double) run.template operator()<double>();
  else run.template operator()<float>();
  return {output, log_det};
}

}  // namespace
}  // namespace fastgen::causal_transformer_inverse

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("causal_transformer_inverse", TORCH_BOX(&fastgen::causal_transformer_inverse::causal_transformer_inverse));
}
