// What forward and backward of group_norm share: how the input lies in memory, in one tensor or in two whose channels are normalised
// as if they stood one after the other in one, its parameters, and the affine form
//
//   y = act(a (x - m) + b),  m = mean - channel_bias,  a = rstd w (1 + scale),  b = bias (1 + scale) + shift
//
// to which a group's statistics and a channel's parameters reduce. (Folding m into b would save a subtraction and lose the
// digits that x and the mean share: all of them where a group is constant, since rstd is then 1 / sqrt(eps).)
#pragma once

#include <algorithm>

#include "common/moments.h"
#include "common/tensor.h"

namespace fastgen::group_norm {

// Rows: [N, C, S] in memory as N blocks of C rows of S elements (contiguous), or of S rows of C (channels-last).
struct Rows {
  std::int64_t batch_stride = 0, row_stride = 0;
};

// The rows of `t` in the given layout; a tensor that does not lie so is replaced by a dense copy. Channel slices of a
// larger tensor (chunk, cat's inputs) lie so and are not copied.
inline Rows as_rows(Tensor& t, bool channels_last) {
  const std::int64_t dim = t.dim();
  const auto lies_in_rows = [&](Rows& rows) {
    const std::int64_t channels = t.size(1);
    // From the innermost outwards: each dimension of more than one element must continue where the last one ended.
    std::int64_t next = 1;
    if (channels_last && channels > 1 && t.stride(1) != 1) return false;
    if (channels_last) next = -1;  // the pixel stride is free
    std::int64_t pixel_stride = channels;
    for (std::int64_t d = dim - 1; d >= 2; --d) {
      if (t.size(d) == 1) continue;
      if (next == -1) next = pixel_stride = t.stride(d);
      if (t.stride(d) != next) return false;
      next *= t.size(d);
    }
    if (channels_last) {
      if (pixel_stride < channels) return false;
      rows.row_stride = pixel_stride;
    } else {
      if (channels > 1 && t.stride(1) != next) return false;
      rows.row_stride = next;
    }
    rows.batch_stride = t.size(0) > 1 ? t.stride(0) : 0;
    return true;
  };
  Rows rows;
  if (t.numel() == 0 || lies_in_rows(rows)) return rows;
  t = copy_dense(t, channels_last);
  lies_in_rows(rows);
  return rows;
}

struct Problem {
  std::int64_t n, channels, pixels, groups, per_group;  // per_group: channels of a group
  std::int64_t seam;                                    // channels of the first input, all of them where there is no second
  bool channels_last, silu;
  double eps;
  Parameter weight, bias, channel_bias, scale, shift;

  std::int64_t group_size() const { return per_group * pixels; }
  std::int64_t elements() const { return n * channels * pixels; }
};

inline Problem make_problem(const char* op, const Tensor& input, const OptionalTensor& skip, std::int64_t groups,
                            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& channel_bias,
                            const OptionalTensor& scale, const OptionalTensor& shift, double eps, std::int64_t activation) {
  FASTGEN_CHECK(input.dim() >= 2, op, ": input must be [N, C, *spatial]");
  check_floating(op, "input", input);
  const std::int64_t n = input.size(0), seam = input.size(1);
  if (skip.has_value()) {
    bool fits = skip->scalar_type() == input.scalar_type() && skip->dim() == input.dim();
    for (std::int64_t d = 0; fits && d < input.dim(); ++d) fits = d == 1 || skip->size(d) == input.size(d);
    FASTGEN_CHECK(fits, op, ": skip must have the dtype and the shape of input, but for the channels");
  }
  const std::int64_t c = seam + (skip.has_value() ? skip->size(1) : 0);
  FASTGEN_CHECK(groups >= 1 && c % groups == 0, op, ": num_groups must divide channels, got num_groups=", groups,
                " and ", c, " channels");
  FASTGEN_CHECK(activation == 0 || activation == 1, op, ": activation must be 0 (none) or 1 (silu), got ", activation);
  std::int64_t pixels = 1;
  for (std::int64_t d = 2; d < input.dim(); ++d) pixels *= input.size(d);
  // One element a row is a matrix [N, C]: it runs along the channels.
  const bool along_channels = is_channels_last(input) || pixels == 1;
  return {n, c, pixels, groups, c / groups, seam, along_channels, activation == 1, eps,
          Parameter(op, "weight", weight, false, n, c), Parameter(op, "bias", bias, false, n, c),
          Parameter(op, "channel_bias", channel_bias, true, n, c), Parameter(op, "scale", scale, true, n, c),
          Parameter(op, "shift", shift, true, n, c)};
}

inline std::vector<std::int64_t> sizes_with_channels(const Tensor& t, std::int64_t channels) {
  auto sizes = sizes_of(t);
  sizes[1] = channels;
  return sizes;
}

// An output of all channels in the layout of `input`.
inline Tensor empty_output(const Problem& p, const Tensor& input, ScalarType dtype) {
  const auto sizes = sizes_with_channels(input, p.channels);
  return empty_strided(sizes, dense_strides(sizes, is_channels_last(input)), dtype);
}

// Channels [first, last) of all, in one of the inputs.
template <class T>
struct Piece {
  const T* data;
  Rows rows;
  std::int64_t first, last;

  std::int64_t channels() const { return last - first; }
  const T* pixel(std::int64_t n, std::int64_t i) const { return data + n * rows.batch_stride + i * rows.row_stride; }  // channels-last
};

// Elements of a group that lies contiguous, in order: `seam` of them from `low` on, the rest from `high` on.
template <class T>
struct Run {
  const T *low, *high;
  std::int64_t seam;

  const T* at(std::int64_t i) const { return i < seam ? low + i : high + (i - seam); }
};

// Of which each channel lies in the first piece or in the second; that has no channels where there is one input.
template <class T>
struct Pieces {
  Piece<T> part[2];
  std::int64_t pixels;

  const T* row(std::int64_t n, std::int64_t c) const {  // contiguous
    const Piece<T>& of = part[c >= part[1].first];
    return of.data + n * of.rows.batch_stride + (c - of.first) * pixels;
  }
  Run<T> run(std::int64_t n, std::int64_t first, std::int64_t channels) const {
    const std::int64_t low = std::clamp<std::int64_t>(part[1].first - first, 0, channels);
    return {low > 0 ? row(n, first) : nullptr, low < channels ? row(n, first + low) : nullptr, low * pixels};
  }
  template <class F>
  void each(const F& f) const {
    for (const Piece<T>& of : part)
      if (of.channels() > 0) f(of);
  }
};

// The inputs in rows: a tensor that does not lie so is held as a copy.
class Inputs {
 public:
  Inputs(const Problem& p, const Tensor& input, const OptionalTensor& skip)
      : seam_(p.seam), channels_(p.channels), pixels_(p.pixels), first_(input), second_(skip), first_rows_(as_rows(first_, p.channels_last)) {
    if (second_.has_value()) second_rows_ = as_rows(*second_, p.channels_last);
  }

  template <class T>
  Pieces<T> pieces() const {
    const T* const second = second_.has_value() ? static_cast<const T*>(second_->data_ptr()) : nullptr;
    return {{{static_cast<const T*>(first_.data_ptr()), first_rows_, 0, seam_}, {second, second_rows_, seam_, channels_}}, pixels_};
  }

 private:
  std::int64_t seam_, channels_, pixels_;
  Tensor first_;
  OptionalTensor second_;
  Rows first_rows_, second_rows_;
};

template <class A>
struct Affine {
  A m, a, b;
};

// The parameters of channels [first, first + count) of sample n, in opmath.
template <class A>
struct Channels {
  std::vector<A> memory;
  std::int64_t count = 0;
  A *weight, *bias, *channel_bias, *scale, *shift;

  explicit Channels(std::int64_t capacity) : memory(5 * capacity) {
    A* p = memory.data();
    weight = p, bias = p + capacity, channel_bias = p + 2 * capacity, scale = p + 3 * capacity, shift = p + 4 * capacity;
  }

  void read(const Problem& p, std::int64_t n, std::int64_t first, std::int64_t channels) {
    count = channels;
    p.weight.read(n, first, channels, A(1), weight);
    p.bias.read(n, first, channels, A(0), bias);
    p.channel_bias.read(n, first, channels, A(0), channel_bias);
    p.scale.read(n, first, channels, A(0), scale);
    p.shift.read(n, first, channels, A(0), shift);
  }

  Affine<A> affine(std::int64_t i, double mean, double rstd) const {
    const double modulation = 1.0 + scale[i], slope = rstd * weight[i] * modulation, centre = mean - channel_bias[i];
    const A m = static_cast<A>(centre);  // what it rounds off is left to b
    return {m, static_cast<A>(slope), static_cast<A>(bias[i] * modulation + shift[i] - (centre - m) * slope)};
  }
};

// bf16 has 8 bits: a 14-bit reciprocal and a cubic exponential are exact enough for it.
template <class T>
inline constexpr bool kLowPrecision = std::is_same_v<T, BFloat16>;

}  // namespace fastgen::group_norm
