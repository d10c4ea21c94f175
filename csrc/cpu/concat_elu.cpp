// concat_elu: elu(x) and elu(-x) side by side along the channels, and its backward.
//
// A thread owns runs of x (common/runs.h), reads each once and writes both halves; both take the same exponential, exp(-|x|). Where the
// planes of x lie one after the other a run may go through several.
#include "common/runs.h"

namespace fastgen::concat_elu {
namespace {

constexpr std::int64_t kLongest = 4096;  // elements of a run
constexpr std::int64_t kWork = 2;        // an exponential is as much work as so many elements of a light operation

struct Problem {
  const char* op;
  std::int64_t channels;
  bool channels_last, rows;

  Problem(const char* op, const Tensor& input) : op(op), channels_last(is_channels_last(input)) {
    check_floating(op, "input", input);
    FASTGEN_CHECK(input.dim() >= 2, op, ": input must be [N, C, *]");
    channels = input.size(1), rows = in_rows(input);
  }
};

// Takes planes that lie one after the other in all tensors for one.
Runs runs_of(const Problem& p, const Tensor& like, std::initializer_list<SliceStrides*> all) {
  Runs runs(like, p.channels, p.rows, kLongest);
  const auto dense = [&](const SliceStrides* s) { return s->apart == 1 && s->along == runs.positions; };
  if (p.rows || !std::all_of(all.begin(), all.end(), dense)) return runs;
  runs.positions *= runs.channels, runs.channels = 1, runs.pieces = (runs.positions + runs.longest - 1) / runs.longest;
  return runs;
}

Tensor concat_elu_fwd(const Tensor& input) {
  const Problem p("concat_elu_fwd", input);
  const auto sizes = with_channels(input, 2 * p.channels);
  Tensor output = empty_strided(sizes, dense_strides(sizes, p.channels_last), input.scalar_type());
  if (output.numel() == 0) return output;
  dispatch_dtype(p.op, input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    Tensor x = input;
    SliceStrides from = as_slices(x, 1, p.rows), to = as_slices(output, 1, p.rows);
    const std::int64_t half = p.channels * to.along;
    const Runs runs = runs_of(p, input, {&from, &to});
    const T* const in = static_cast<const T*>(x.data_ptr());
    T* const out = static_cast<T*>(output.mutable_data_ptr());
    parallel(runs.count(), runs.elements() * kWork, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const Run run = runs[item];
        const T* const x_run = in + run.offset(from);
        T* const y = out + run.offset(to);
        for_vectors<A>(run.count, [&](std::int64_t i, auto at) {
          const EluOfBoth<A> elu = elu_of_both<A>(at.load(x_run + i));
          at.store(y + i, elu.value);
          at.store(y + half + i, elu.of_negative);
        });
      }
    });
  });
  return output;
}

Tensor concat_elu_bwd(const Tensor& grad_output, const Tensor& input) {
  const Problem p("concat_elu_bwd", input);
  check_floating(p.op, "grad_output", grad_output);
  FASTGEN_CHECK(sizes_of(grad_output) == with_channels(input, 2 * p.channels) && grad_output.scalar_type() == input.scalar_type(), p.op,
                ": grad_output must be [N, 2 C, *] in the dtype of input");
  Tensor d_input = empty_dense(input, p.channels_last, input.scalar_type());
  if (input.numel() == 0) return d_input;
  dispatch_dtype(p.op, input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    Tensor x = input, dy = grad_output;
    SliceStrides from = as_slices(x, 1, p.rows), of_grad = as_slices(dy, 1, p.rows), to = as_slices(d_input, 1, p.rows);
    const std::int64_t half = p.channels * of_grad.along;
    const Runs runs = runs_of(p, input, {&from, &of_grad, &to});
    const T *const in = static_cast<const T*>(x.data_ptr()), *const grad = static_cast<const T*>(dy.data_ptr());
    T* const out = static_cast<T*>(d_input.mutable_data_ptr());
    parallel(runs.count(), runs.elements() * kWork, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const Run run = runs[item];
        const T *const x_run = in + run.offset(from), *const g = grad + run.offset(of_grad);
        T* const d = out + run.offset(to);
        for_vectors<A>(run.count, [&](std::int64_t i, auto at) {
          const EluOfBoth<A> slope = elu_slopes_of_both<A>(at.load(x_run + i));
          at.store(d + i, Vec<A>(at.load(g + i) * slope.value - at.load(g + half + i) * slope.of_negative));
        });
      }
    });
  });
  return d_input;
}

}  // namespace
}  // namespace fastgen::concat_elu

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("concat_elu_fwd", TORCH_BOX(&fastgen::concat_elu::concat_elu_fwd));
  m.impl("concat_elu_bwd", TORCH_BOX(&fastgen::concat_elu::concat_elu_bwd));
}
