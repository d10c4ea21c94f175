// actnorm_statistics: mean and deviation of each channel over samples and positions, in one read.
//
// Moments (common/moments.h) of parts that depend on the shape alone, each in two passes over what the cache holds, are merged in order in
// fp64. Planes: a part is a run of positions. Rows: a lane of a block of rows, `together` lanes a channel.
#include "actnorm.h"
#include "common/moments.h"

namespace fastgen::actnorm {
namespace {

template <class T>
void of_planes(const Problem& p, const Tensor& input, const T* x, const SliceStrides& strides, std::vector<Moments>& merged) {
  const Runs runs(input, p.channels, false, 4 * kLongest);
  std::vector<Moments> parts(runs.count());
  parallel(runs.count(), p.elements(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) parts[item] = quick_moments(x + runs[item].offset(strides), runs[item].count);
  });
  for (std::int64_t item = 0; item < runs.count(); ++item) merged[runs[item].channel].merge(parts[item]);
}

// Of `rows` rows of `size` elements, merged channel by channel.
template <class T>
void add_rows(const T* x, std::int64_t apart, std::int64_t rows, std::int64_t size, std::int64_t channels, opmath_t<T>* lanes, Moments* to) {
  using A = opmath_t<T>;
  A *const mean = lanes, *const missed = lanes + size, *const square = missed + size;
  const A share = A(1) / static_cast<A>(rows);
  for_vectors<A>(size, [&](std::int64_t i, auto at) {
    Vec<A> sum(A(0)), rest(A(0)), squares(A(0));
    for (std::int64_t r = 0; r < rows; ++r) sum += at.load(x + r * apart + i);
    const Vec<A> centre = sum * share;
    for (std::int64_t r = 0; r < rows; ++r) {
      const Vec<A> d = at.load(x + r * apart + i) - centre;
      rest += d, squares = madd<A>(d, d, squares);
    }
    at.store(mean + i, centre);
    at.store(missed + i, Vec<A>(rest * share));  // by the rounding of the centre
    at.store(square + i, Vec<A>(squares - rest * rest * share));
  });
  for (std::int64_t i = 0; i < size; ++i)
    to[i % channels].merge({static_cast<double>(rows), static_cast<double>(mean[i]) + missed[i], static_cast<double>(square[i])});
}

template <class T>
void of_rows(const Problem& p, const T* x, const SliceStrides& strides, std::vector<Moments>& merged) {
  const RowBlocks blocks(p, {&strides});
  const std::int64_t items = p.n * blocks.a_sample;
  std::vector<Moments> parts(items * p.channels);
  parallel(items, p.elements(), [&](std::int64_t begin, std::int64_t end) {
    std::vector<opmath_t<T>> lanes(3 * blocks.together * p.channels);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t first = item % blocks.a_sample * blocks.block, count = std::min(blocks.block, p.positions - first);
      const std::int64_t whole = count / blocks.together, rest = count % blocks.together;
      const T* const from = x + item / blocks.a_sample * strides.sample + first * strides.apart;
      const std::int64_t row = blocks.together * strides.apart, size = blocks.together * p.channels;
      Moments* const to = parts.data() + item * p.channels;
      if (whole > 0) add_rows(from, row, whole, size, p.channels, lanes.data(), to);
      if (rest > 0) add_rows(from + whole * row, row, 1, rest * p.channels, p.channels, lanes.data(), to);
    }
  });
  for (std::int64_t item = 0; item < items; ++item)
    for (std::int64_t c = 0; c < p.channels; ++c) merged[c].merge(parts[item * p.channels + c]);
}

std::tuple<Tensor, Tensor> actnorm_statistics(const Tensor& input, std::int64_t correction) {
  const Problem p("actnorm_statistics", input);
  FASTGEN_CHECK(correction == 0 || correction == 1, "actnorm_statistics: correction must be 0 or 1, got ", correction);
  const ScalarType opmath = opmath_type(input.scalar_type());
  Tensor mean = empty_contiguous({p.channels}, opmath), deviation = empty_contiguous({p.channels}, opmath);
  dispatch_dtype(p.op, input.scalar_type(), [&]<class T>() {
    using A = opmath_t<T>;
    std::vector<Moments> moments(p.channels);
    if (p.elements() > 0) {
      Tensor x = input;
      const SliceStrides strides = p.strides(x);
      if (p.rows) of_rows(p, static_cast<const T*>(x.data_ptr()), strides, moments);
      else of_planes(p, input, static_cast<const T*>(x.data_ptr()), strides, moments);
    }
    A *const to_mean = static_cast<A*>(mean.mutable_data_ptr()), *const to_deviation = static_cast<A*>(deviation.mutable_data_ptr());
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const Moments& m = moments[c];
      to_mean[c] = m.count > 0 ? static_cast<A>(m.mean) : std::numeric_limits<A>::quiet_NaN();
      to_deviation[c] = static_cast<A>(std::sqrt((m.m2 < 0 ? 0 : m.m2) / std::max(m.count - static_cast<double>(correction), 0.0)));
    }
  });
  return {mean, deviation};
}

}  // namespace
}  // namespace fastgen::actnorm

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("actnorm_statistics", TORCH_BOX(&fastgen::actnorm::actnorm_statistics)); }
