// gaussian_log_prob: the log-density of samples under independent normals, one pass over each tensor, and its backward.
//
// A thread owns runs (common/runs.h) of the input with those of mean and log-scale beside them. A sample's sum is taken by pieces of
// kPiece elements or little more, in the dtype of the arithmetic, and over the pieces in fp64: the same bits whoever takes them. Packed
// parameters are read and their gradients written where they lie; where they are interleaved along a run, through two rows of scratch.
#include <cmath>
#include <memory>

#include "common/runs.h"
#include "common/simd/groups.h"

namespace fastgen::gaussian_log_prob {
namespace {

// In the order of GAUSSIAN_LAYOUTS of fastgen/_schema.py.
enum class Layout { kMeanFirst, kScaleFirst, kInterleaved };

constexpr std::int64_t kPiece = 2048;  // elements: 128 additions to each lane of a sum in fp32
constexpr std::int64_t kWork = 3;      // an exponential is as much work as so many elements of a light operation
constexpr double kHalfLog2Pi = 0.91893853320467274178;

struct Problem {
  const char* op;
  std::int64_t channels, features;
  bool channels_last, rows, given, packed;
  Layout layout;

  Problem(const char* op, const Tensor& input, const OptionalTensor& mean, const OptionalTensor& log_scale, std::int64_t layout)
      : op(op), channels_last(is_channels_last(input)), given(mean.has_value()), packed(given && !log_scale.has_value()),
        layout(static_cast<Layout>(layout)) {
    check_floating(op, "input", input);
    FASTGEN_CHECK(input.dim() >= 2, op, ": input must be [N, C, *]");
    FASTGEN_CHECK(layout >= 0 && layout <= 2, op, ": layout must be in [0, 3), got ", layout);
    FASTGEN_CHECK(given || !log_scale.has_value(), op, ": log_scale needs mean beside it");
    channels = input.size(1), features = channels * SliceSizes(input, 1).count, rows = in_rows(input);
    if (!given) return;
    check_floating(op, "mean", *mean);
    FASTGEN_CHECK(sizes_of(*mean) == with_channels(input, packed ? 2 * channels : channels), op, ": mean must have the shape of input",
                  packed ? " with twice its channels" : "");
    if (packed) return;
    check_floating(op, "log_scale", *log_scale);
    FASTGEN_CHECK(sizes_of(*log_scale) == sizes_of(input), op, ": log_scale must have the shape of input");
  }
};

// A tensor as runs are taken from it, in `dtype`: itself where it lies so, else a copy.
struct Operand {
  Tensor tensor;
  SliceStrides strides;

  Operand(const Tensor& t, const Problem& p, ScalarType dtype) : tensor(t) {
    if (t.scalar_type() != dtype) tensor = empty_dense(t, p.channels_last, dtype), torch::stable::copy_(tensor, t);
    strides = as_slices(tensor, 1, p.rows);
  }
  template <class T>
  T* data() const { return static_cast<T*>(tensor.data_ptr()); }
};

// Mean and log-scale, or their gradients, as two tensors of the shape of the input.
template <class Q>
struct Pair {
  Q *mean = nullptr, *log_scale = nullptr;
  SliceStrides mean_strides, log_scale_strides;
  std::int64_t step = 1;  // from an element of a run to the next: 2 where both are interleaved along it

  // Both in `packed`.
  Pair(const Problem& p, const Operand& packed) : mean(packed.data<Q>()), log_scale(mean), mean_strides(packed.strides) {
    const std::int64_t along = packed.strides.along;
    if (p.layout == Layout::kInterleaved) {
      log_scale += along, mean_strides.along = 2 * along;
      if (p.rows) step = 2;
    } else {
      (p.layout == Layout::kMeanFirst ? log_scale : mean) += p.channels * along;
    }
    log_scale_strides = mean_strides;
  }
  Pair(const Operand& mean, const Operand& log_scale)
      : mean(mean.data<Q>()), log_scale(log_scale.data<Q>()), mean_strides(mean.strides), log_scale_strides(log_scale.strides) {}
};

// Takes planes that lie one after the other in all tensors for one.
Runs runs_of(const Problem& p, const Tensor& input, std::initializer_list<const SliceStrides*> all) {
  Runs runs(input, p.channels, p.rows, kPiece);
  const auto dense = [&](const SliceStrides* s) { return s->apart == 1 && s->along == runs.positions; };
  if (p.rows || !std::all_of(all.begin(), all.end(), dense)) return runs;
  runs.positions *= runs.channels, runs.channels = 1, runs.pieces = (runs.positions + runs.longest - 1) / runs.longest;
  return runs;
}

// Runs of a sample in pieces.
struct Pieces {
  std::int64_t runs, together, count;  // of a sample: runs, runs of a piece, pieces

  explicit Pieces(const Runs& all) : runs(all.rows ? all.positions : all.channels * all.pieces) {
    const std::int64_t length = std::max<std::int64_t>(all.rows ? all.channels : std::min(all.positions, all.longest), 1);
    together = std::max<std::int64_t>(kPiece / length, 1);
    count = (runs + together - 1) / together;
  }
};

// Rows of scratch for what is interleaved along a run.
template <class Q>
class Staged {
 public:
  Staged(const Pair<Q>& pair, std::int64_t longest) : pair_(pair), rows_(pair.step == 2 ? 2 * longest : 0), longest_(longest) {}

  struct At {
    Q *mean, *log_scale;
  };
  At at(const Run& run) const { return {pair_.mean + run.offset(pair_.mean_strides), pair_.log_scale + run.offset(pair_.log_scale_strides)}; }
  At read(const Run& run) {
    const At from = at(run);
    if (pair_.step == 1) return from;
    for (std::int64_t i = 0; i < run.count; ++i) rows_[i] = from.mean[2 * i], rows_[longest_ + i] = from.log_scale[2 * i];
    return {rows_.data(), rows_.data() + longest_};
  }
  At begin_write(const Run& run) { return pair_.step == 1 ? at(run) : At{rows_.data(), rows_.data() + longest_}; }
  void end_write(const Run& run) {
    if (pair_.step == 1) return;
    const At to = at(run);
    for (std::int64_t i = 0; i < run.count; ++i) to.mean[2 * i] = rows_[i], to.log_scale[2 * i] = rows_[longest_ + i];
  }

 private:
  const Pair<Q>& pair_;
  std::vector<Q> rows_;
  std::int64_t longest_;
};

std::int64_t longest(const Runs& runs) { return runs.rows ? runs.channels : runs.longest; }

// What a sum is made of: squares of which half is taken away, and logarithms of scales; two of each, so that no addition waits.
template <class A>
struct Terms {
  Vec<A> squares[2] = {Vec<A>(A(0)), Vec<A>(A(0))}, scales[2] = {Vec<A>(A(0)), Vec<A>(A(0))};

  FASTGEN_INLINE Vec<A> total() const {
    return madd<A>(squares[0] + squares[1], Vec<A>(A(-0.5)), -(scales[0] + scales[1]));
  }
};

// Has f take the sums of all samples, by runs that are added to terms, and writes them.
template <class A, class F>
void sum_pieces(const Problem& p, const Runs& runs, A* to, const F& f) {
  const Pieces pieces(runs);
  const double constant = -kHalfLog2Pi * static_cast<double>(p.features);
  const bool whole = pieces.count == 1;  // a sample is one piece: whoever has summed it writes it
  const std::unique_ptr<A[]> parts(whole ? nullptr : new A[runs.n * pieces.count]);
  A* const sums = whole ? to : parts.get();
  parallel(runs.n * pieces.count, runs.elements() * kWork, [&](std::int64_t begin, std::int64_t end) {
    f([&](const auto& sum_of_run) {  // once a thread
      for (std::int64_t block = begin; block < end; block += kWidth<A>) {  // whose lanes are added up together
        const int some = static_cast<int>(std::min<std::int64_t>(end - block, kWidth<A>));
        Vec<A> sum[kWidth<A>];
        for (int k = 0; k < kWidth<A>; ++k) sum[k] = Vec<A>(A(0));
        for (int k = 0; k < some; ++k) {
          const std::int64_t item = block + k;
          const std::int64_t n = whole ? item : item / pieces.count, first = whole ? 0 : item % pieces.count * pieces.together;
          Terms<A> terms;
          for (std::int64_t i = first; i < std::min(first + pieces.together, pieces.runs); ++i) sum_of_run(runs[n * pieces.runs + i], terms);
          sum[k] = terms.total();
        }
        const Vec<A> total = sums_of_lanes<A>(sum);
        for (int k = 0; k < some; ++k) sums[block + k] = whole ? static_cast<A>(constant + static_cast<A>(total[k])) : static_cast<A>(total[k]);
      }
    });
  });
  for (std::int64_t n = 0; n < (whole ? 0 : runs.n); ++n) {
    double total = constant;
    for (std::int64_t i = 0; i < pieces.count; ++i) total += parts[n * pieces.count + i];
    to[n] = static_cast<A>(total);
  }
}

// Calls f.template operator()<Q>(), Q the dtype in which parameters are read: that of the input where both have it, else that of the
// arithmetic.
template <class T, class F>
void with_dtype_of_parameters(const OptionalTensor& mean, const OptionalTensor& log_scale, ScalarType dtype, const F& f) {
  if (mean->scalar_type() == dtype && (!log_scale.has_value() || log_scale->scalar_type() == dtype)) f.template operator()<T>(dtype);
  else f.template operator()<opmath_t<T>>(opmath_type(dtype));
}

Tensor gaussian_log_prob_fwd(const Tensor& input, OptionalTensor mean, OptionalTensor log_scale, std::int64_t layout) {
  const Problem p("gaussian_log_prob", input, mean, log_scale, layout);
  const ScalarType dtype = input.scalar_type();
  Tensor output = empty_contiguous({input.size(0)}, opmath_type(dtype));
  dispatch_dtype(p.op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    using V = Vec<A>;
    A* const to = static_cast<A*>(output.mutable_data_ptr());
    if (input.numel() == 0) return std::fill_n(to, output.numel(), A(0)), void();
    const Operand x(input, p, dtype);
    const T* const in = x.data<const T>();
    if (!p.given) {
      const Runs runs = runs_of(p, input, {&x.strides});
      return sum_pieces<A>(p, runs, to, [&](const auto& for_pieces) {
        for_pieces([&](const Run& run, Terms<A>& terms) {
          const T* const from = in + run.offset(x.strides);
          Terms<A> of = terms;
          for_groups<A>(run.count, [&]<int n>(std::int64_t i, auto at, std::integral_constant<int, n>) FASTGEN_LAMBDA {
            for (int k = 0; k < n; ++k) {
              const V u = at.load(from + i + k * kWidth<A>);
              of.squares[k % 2] = madd<A>(u, u, of.squares[k % 2]);
            }
          });
          terms = of;
        });
      });
    }
    with_dtype_of_parameters<T>(mean, log_scale, dtype, [&]<class Q>(ScalarType read_in) {
      const Operand m(*mean, p, read_in), s = p.packed ? m : Operand(*log_scale, p, read_in);
      const Pair<Q> pair = p.packed ? Pair<Q>(p, m) : Pair<Q>(m, s);
      const Runs runs = runs_of(p, input, {&x.strides, &pair.mean_strides, &pair.log_scale_strides});
      sum_pieces<A>(p, runs, to, [&](const auto& for_pieces) {
        Staged<Q> staged(pair, longest(runs));
        for_pieces([&](const Run& run, Terms<A>& terms) {
          const T* const from = in + run.offset(x.strides);
          const auto parameters = staged.read(run);
          Terms<A> of = terms;
          for_groups<A>(run.count, [&]<int n>(std::int64_t i, auto at, std::integral_constant<int, n>) FASTGEN_LAMBDA {
            V e[n];  // beyond the end of a run all is 0
            for (int k = 0; k < n; ++k) {
              const V scale = at.load(parameters.log_scale + i + k * kWidth<A>);
              e[k] = -scale, of.scales[k % 2] += scale;
            }
            exp_of_any(e);
            for (int k = 0; k < n; ++k) {
              const std::int64_t j = i + k * kWidth<A>;
              const V u = (at.load(from + j) - at.load(parameters.mean + j)) * e[k];
              of.squares[k % 2] = madd<A>(u, u, of.squares[k % 2]);
            }
          });
          terms = of;
        });
      });
    });
  });
  return output;
}

// The gradient of `like` as it is written, in `dtype`, and as it is returned.
struct Written {
  Tensor returned;
  Operand written;

  Written(const Tensor& like, const Problem& p, ScalarType dtype)
      : returned(empty_dense(like, is_channels_last(like), like.scalar_type())),
        written(dtype == like.scalar_type() && is_dense(returned, p.channels_last) ? returned : empty_dense(like, p.channels_last, dtype), p, dtype) {}
  void finish() {
    if (written.tensor.data_ptr() != returned.data_ptr()) torch::stable::copy_(returned, written.tensor);
  }
};

std::tuple<Tensor, Tensor, Tensor> gaussian_log_prob_bwd(const Tensor& grad_log_prob, const Tensor& input, OptionalTensor mean,
                                                         OptionalTensor log_scale, std::int64_t layout) {
  const Problem p("gaussian_log_prob", input, mean, log_scale, layout);
  const ScalarType dtype = input.scalar_type();
  const std::int64_t n = input.size(0);
  FASTGEN_CHECK(grad_log_prob.dim() == 1 && grad_log_prob.size(0) == n, p.op, ": grad_log_prob must be [N]");
  Tensor d_input = empty_dense(input, p.channels_last, dtype);
  const auto none = [&] { return empty_contiguous({0}, opmath_type(dtype)); };
  Tensor d_mean = none(), d_log_scale = none();
  dispatch_dtype(p.op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    using V = Vec<A>;
    std::vector<A> grads(n);
    Parameter(p.op, "grad_log_prob", grad_log_prob, false, 0, n).read(0, 0, n, A(0), grads.data());
    const Operand x(input, p, dtype), dx(d_input, p, dtype);
    const T* const in = x.data<const T>();
    T* const out = dx.data<T>();
    if (!p.given) {
      const Runs runs = runs_of(p, input, {&x.strides, &dx.strides});
      if (input.numel() == 0) return;
      parallel(runs.count(), runs.elements(), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
          const Run run = runs[item];
          const V grad(-grads[run.n]);
          const T* const from = in + run.offset(x.strides);
          T* const to = out + run.offset(dx.strides);
          for_vectors<A>(run.count, [&](std::int64_t i, auto at) { at.store(to + i, V(at.load(from + i) * grad)); });
        }
      });
      return;
    }
    with_dtype_of_parameters<T>(mean, log_scale, dtype, [&]<class Q>(ScalarType read_in) {
      const Operand m(*mean, p, read_in), s = p.packed ? m : Operand(*log_scale, p, read_in);
      Written to_mean(*mean, p, read_in);
      std::optional<Written> to_log_scale;
      if (!p.packed) to_log_scale.emplace(*log_scale, p, read_in);
      const Pair<Q> pair = p.packed ? Pair<Q>(p, m) : Pair<Q>(m, s);
      const Pair<Q> written = p.packed ? Pair<Q>(p, to_mean.written) : Pair<Q>(to_mean.written, to_log_scale->written);
      const Runs runs = runs_of(p, input, {&x.strides, &dx.strides, &pair.mean_strides, &pair.log_scale_strides, &written.mean_strides});
      if (input.numel() > 0)
        parallel(runs.count(), runs.elements() * kWork, [&](std::int64_t begin, std::int64_t end) {
          Staged<Q> staged(pair, longest(runs)), staged_grads(written, longest(runs));
          for (std::int64_t item = begin; item < end; ++item) {
            const Run run = runs[item];
            const V grad(grads[run.n]);
            const T* const from = in + run.offset(x.strides);
            T* const to = out + run.offset(dx.strides);
            const auto parameters = staged.read(run), gradients = staged_grads.begin_write(run);
            for_groups<A>(run.count, [&]<int n>(std::int64_t i, auto at, std::integral_constant<int, n>) FASTGEN_LAMBDA {
              V e[n];
              for (int k = 0; k < n; ++k) e[k] = -at.load(parameters.log_scale + i + k * kWidth<A>);
              exp_of_any(e);
              for (int k = 0; k < n; ++k) {
                const std::int64_t j = i + k * kWidth<A>;
                const V u = (at.load(from + j) - at.load(parameters.mean + j)) * e[k], of_mean = grad * u * e[k];
                at.store(to + j, V(-of_mean));
                at.store(gradients.mean + j, of_mean);
                at.store(gradients.log_scale + j, V(grad * madd<A>(u, u, V(A(-1)))));
              }
            });
            staged_grads.end_write(run);
          }
        });
      to_mean.finish(), d_mean = to_mean.returned;
      if (to_log_scale) to_log_scale->finish(), d_log_scale = to_log_scale->returned;
    });
  });
  return {d_input, d_mean, d_log_scale};
}

}  // namespace
}  // namespace fastgen::gaussian_log_prob

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("gaussian_log_prob_fwd", TORCH_BOX(&fastgen::gaussian_log_prob::gaussian_log_prob_fwd));
  m.impl("gaussian_log_prob_bwd", TORCH_BOX(&fastgen::gaussian_log_prob::gaussian_log_prob_bwd));
}
