// The elements of a call of `rational_quadratic_spline`: the arguments, checked; the tiles they are cut into; and the parameters of a vector
// of them, read into columns and written back, whichever way they lie.
//
// Elements are counted sample by sample, channel by channel of those transformed, position by position. A tile is owned by one thread: some
// samples whole, or a part of one. Input and gradients are read into rows of the tile first, in any dtype, so that the arithmetic exists once.
#pragma once

#include <algorithm>
#include <array>
#include <memory>

#include "common/tensor.h"
#include "cpu/_spline_definition.h"

namespace fastgen::rational_quadratic_spline {

inline constexpr const char* kOp = "rational_quadratic_spline";
inline constexpr std::int64_t kTile = 512;  // elements: rows of them stay in the first cache

// Where the parameters of an element lie: [N, C', *, columns].
struct Lie {
  std::int64_t columns = 0, sample = 0, channel = 0, position = 0, column = 1;
  bool even = false;  // one step, `position`, from each element to the next

  std::int64_t at(std::int64_t n, std::int64_t channel_index, std::int64_t s) const {
    return n * sample + channel_index * channel + s * position;
  }
};

// Positions of any strides that come down to one; a tensor whose do not is replaced by a dense copy.
inline Lie lie_of(Tensor& t, std::int64_t positions) {
  const std::int64_t last = t.dim() - 1;
  const auto try_so = [&](Lie& lie) {
    lie = {t.size(last), t.stride(0), t.stride(1), 0, t.size(last) > 1 ? t.stride(last) : 1};
    std::int64_t next = 0;
    bool found = false;
    for (std::int64_t d = last - 1; d >= 2; --d) {
      if (t.size(d) == 1) continue;
      if (!found) found = true, next = lie.position = t.stride(d);
      if (t.stride(d) != next) return false;
      next *= t.size(d);
    }
    const std::int64_t channels = t.size(1), step = positions > 1 ? lie.position : channels > 1 ? lie.channel : lie.sample;
    lie.even = (channels == 1 || lie.channel == positions * step) && (t.size(0) == 1 || lie.sample == channels * positions * step);
    if (lie.even) lie.position = step, lie.channel = positions * step, lie.sample = channels * positions * step;
    return true;
  };
  Lie lie;
  if (t.numel() == 0 || try_so(lie)) return lie.columns = t.size(last), lie;
  t = copy_dense(t, false);
  try_so(lie);
  return lie;
}

// Dense strides with the dimensions in the order in which those of `t` lie, expanded ones outermost: `_layout.strides_in_order_of`.
inline Tensor empty_in_order_of(const Tensor& t) {
  std::vector<std::int64_t> order;
  for (std::int64_t d = 0; d < t.dim(); ++d) order.push_back(d);
  const auto rank = [&](std::int64_t d) { return t.stride(d) == 0 ? std::numeric_limits<std::int64_t>::max() : t.stride(d); };
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return rank(a) > rank(b); });
  auto sizes = sizes_of(t), strides = sizes;
  std::int64_t step = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) strides[*d] = step, step *= std::max<std::int64_t>(sizes[*d], 1);
  return empty_strided(sizes, strides, t.scalar_type());
}

struct Problem : Definition {
  Tensor input;  // dense
  std::array<Tensor, 3> parameters;  // widths, heights and derivatives, or one of all
  std::array<Lie, 3> lies;
  std::int64_t count = 1;  // of parameters
  std::vector<std::int64_t> channels, copied;  // those transformed, the others
  std::int64_t n, c, positions, elements;  // the last of a sample
  std::int64_t channel_step, position_step;  // of input
  std::int64_t tiles_of_sample, samples_of_tile, tiles;
  bool inverse, reduce, channels_last, plain;  // plain: elements stand in input as they are counted
  std::vector<double> bounds;  // a channel that is transformed, or empty

  Problem(const Tensor& x, const Tensor& widths, const OptionalTensor& heights, const OptionalTensor& derivatives_, const OptionalTensor& mask,
          const OptionalTensor& bounds_, const Numbers& numbers, std::int64_t num_bins, std::int64_t tails, std::int64_t parametrization,
          bool inverse, bool reduce)
      : Definition(kOp, numbers, num_bins, tails, parametrization), input(x), inverse(inverse), reduce(reduce) {
    check_floating(kOp, "input", x);
    FASTGEN_CHECK(x.dim() >= 2, kOp, ": input must be [N, C, *]");
    n = x.size(0), c = x.size(1), positions = 1;
    for (std::int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
    choose_channels(mask);
    if (bounds_.has_value()) {
      bounds.resize(channels.size());
      Parameter(kOp, "bounds", bounds_, false, n, transformed()).read<double>(0, 0, transformed(), 1.0, bounds.data());
    }
    take_parameters(widths, heights, derivatives_);
    elements = transformed() * positions;
    channels_last = is_channels_last(x);
    input = as_dense(x, channels_last);
    plain = !mask.has_value() && (!channels_last || positions == 1);
    channel_step = channels_last ? 1 : positions, position_step = channels_last ? c : 1;
    tiles_of_sample = std::max<std::int64_t>((elements + kTile - 1) / kTile, 1);
    samples_of_tile = tiles_of_sample > 1 ? 1 : kTile / std::max<std::int64_t>(elements, 1);
    tiles = tiles_of_sample * ((n + samples_of_tile - 1) / samples_of_tile);
  }

  std::int64_t transformed() const { return static_cast<std::int64_t>(channels.size()); }
  bool packed() const { return count == 1; }
  ScalarType dtype() const { return parameters[0].scalar_type(); }
  std::int64_t work() const { return n * std::max<std::int64_t>(elements, copied.size() * positions) * 4 * bins; }

 private:
  void choose_channels(const OptionalTensor& mask) {
    std::vector<bool> taken(c, !mask.has_value());
    if (!mask.has_value()) {
      for (std::int64_t i = 0; i < c; ++i) channels.push_back(i);
    } else {
      FASTGEN_CHECK(mask->dim() == 1 && mask->scalar_type() == ScalarType::Long, kOp, ": mask must be int64 [C']");
      FASTGEN_CHECK(mask->size(0) <= c, kOp, ": mask must name each channel once, got ", mask->size(0), " of ", c);
      const auto* p = static_cast<const std::int64_t*>(mask->data_ptr());
      for (std::int64_t j = 0; j < mask->size(0); ++j) {
        const std::int64_t i = p[j * mask->stride(0)];
        FASTGEN_CHECK(i >= 0 && i < c, kOp, ": mask must be in [0, ", c, "), got mask[", j, "] = ", i);
        FASTGEN_CHECK(!taken[i], kOp, ": mask must name each channel once, got ", i, " twice");
        taken[i] = true, channels.push_back(i);
      }
    }
    for (std::int64_t i = 0; i < c; ++i)
      if (!taken[i]) copied.push_back(i);
  }

  void take_parameters(const Tensor& widths, const OptionalTensor& heights, const OptionalTensor& slopes) {
    FASTGEN_CHECK(heights.has_value() == slopes.has_value(), kOp, ": heights and derivatives must be given together, or neither");
    parameters[0] = widths;
    if (heights.has_value()) parameters[1] = *heights, parameters[2] = *slopes, count = 3;
    const char* const names[] = {"widths", "heights", "derivatives"};
    for (std::int64_t i = 0; i < count; ++i) {
      Tensor& t = parameters[i];
      check_floating(kOp, names[i], t);
      bool fits = t.dim() == input.dim() + 1 && t.size(0) == n && t.size(1) == transformed();
      for (std::int64_t d = 2; fits && d < input.dim(); ++d) fits = t.size(d) == input.size(d);
      FASTGEN_CHECK(fits, kOp, ": ", names[i], " must be [N, C', *, parameters] with the sizes of input and C' = ", transformed());
      FASTGEN_CHECK(t.scalar_type() == widths.scalar_type(), kOp, ": widths, heights and derivatives must have one dtype");
      lies[i] = lie_of(t, positions);
    }
    FASTGEN_CHECK(opmath_type(dtype()) == opmath_type(input.scalar_type()), kOp, ": widths must be float64 where input is, and nowhere else");
    if (count == 3)
      FASTGEN_CHECK(lies[0].columns == bins && lies[1].columns == bins, kOp, ": widths and heights must be [*, ", bins, "]");
    const std::int64_t slopes_given = count == 3 ? lies[2].columns : lies[0].columns - 2 * bins;
    FASTGEN_CHECK(takes(2 * bins + slopes_given), kOp, ": derivatives must be [*, ", usual(), "], packed widths [*, ", 2 * bins + usual(), "]");
    set_derivatives(slopes_given);
  }
};

// Elements [first, last) of all, counted as above.
struct Tile {
  std::int64_t first_sample, last_sample, first, last, part;

  Tile(const Problem& p, std::int64_t item) : part(item % p.tiles_of_sample) {
    first_sample = item / p.tiles_of_sample * p.samples_of_tile, last_sample = std::min(first_sample + p.samples_of_tile, p.n);
    first = first_sample * p.elements + part * kTile;
    last = std::min(last_sample * p.elements, p.tiles_of_sample > 1 ? first + kTile : last_sample * p.elements);
  }
  std::int64_t count() const { return last - first; }

  // Calls f(element of the tile, offset in a tensor like input, channel j of those transformed, length, step) for runs of the tile.
  template <class F>
  FASTGEN_INLINE void for_runs(const Problem& p, const F& f) const {
    if (p.plain) return f(0, first, -1, count(), 1);
    std::int64_t e = first, n = e / std::max<std::int64_t>(p.elements, 1), rest = e - n * p.elements, j = rest / std::max<std::int64_t>(p.positions, 1),
                 s = rest - j * p.positions;
    while (e < last) {
      const std::int64_t length = std::min(p.positions - s, last - e);
      f(e - first, n * p.c * p.positions + p.channels[j] * p.channel_step + s * p.position_step, j, length, p.position_step);
      e += length, s = 0;
      if (++j == p.transformed()) j = 0, ++n;
    }
  }
};

// A row of the tile from a tensor like input, of any dtype.
template <class A>
void read_row(const Problem& p, const Tile& tile, const Tensor& t, A* row) {
  dispatch_dtype(kOp, t.scalar_type(), [&]<class T>() {
    const T* const data = static_cast<const T*>(t.data_ptr());
    tile.for_runs(p, [&](std::int64_t e, std::int64_t at, std::int64_t, std::int64_t length, std::int64_t step) {
      if (step == 1) for (std::int64_t i = 0; i < length; ++i) row[e + i] = static_cast<A>(widen(data[at + i]));
      else for (std::int64_t i = 0; i < length; ++i) row[e + i] = static_cast<A>(widen(data[at + i * step]));
    });
  });
}

// The way back; what is not of this arithmetic is never asked for.
template <class A>
void write_row(const Problem& p, const Tile& tile, Tensor& t, const A* row) {
  dispatch_dtype(kOp, t.scalar_type(), [&]<class T>() {
    if constexpr (std::is_same_v<opmath_t<T>, A>) {
      T* const data = static_cast<T*>(t.mutable_data_ptr());
      tile.for_runs(p, [&](std::int64_t e, std::int64_t at, std::int64_t, std::int64_t length, std::int64_t step) {
        if (step == 1) for_vectors<A>(length, [&](std::int64_t i, auto how) { how.store(data + at + i, how.load(row + e + i)); });
        else for (std::int64_t i = 0; i < length; ++i) data[at + i * step] = narrow<T>(row[e + i]);
      });
    }
  });
}

// The channels of the tile's samples that are not transformed, from a tensor like input to another of its dtype, or zeros; of a sample in
// parts some channels each.
template <class F>
void for_copied(const Problem& p, const Tile& tile, const F& f) {
  const auto count = static_cast<std::int64_t>(p.copied.size());
  for (std::int64_t n = tile.first_sample; n < tile.last_sample; ++n)
    for (std::int64_t k = tile.part; k < count; k += p.tiles_of_sample) {
      const std::int64_t at = n * p.c * p.positions + p.copied[k] * p.channel_step;
      for (std::int64_t i = 0; i < p.positions; ++i) f(at + i * p.position_step);
    }
}
inline void copy_others(const Problem& p, const Tile& tile, const Tensor& from, Tensor& to) {
  if (p.copied.empty()) return;
  dispatch_dtype(kOp, to.scalar_type(), [&]<class T>() {
    T* const out = static_cast<T*>(to.mutable_data_ptr());
    dispatch_dtype(kOp, from.scalar_type(), [&]<class F>() {
      const F* const in = static_cast<const F*>(from.data_ptr());
      for_copied(p, tile, [&](std::int64_t at) {
        if constexpr (std::is_same_v<T, F>) out[at] = in[at];
        else out[at] = narrow<T>(static_cast<opmath_t<T>>(widen(in[at])));
      });
    });
  });
}
template <class A>
void zero_others(const Problem& p, const Tile& tile, Tensor& to) {
  A* const out = static_cast<A*>(to.mutable_data_ptr());
  for_copied(p, tile, [&](std::int64_t at) { out[at] = A(0); });
}

// The gradients of the log-determinants of a tile's elements: one a sample, [N] through a stride, or one an element, like input.
template <class A>
void read_log_grads(const Problem& p, const Tile& tile, const Tensor& grad, A* row) {
  if (!p.reduce) return read_row<A>(p, tile, grad, row);
  dispatch_dtype(kOp, grad.scalar_type(), [&]<class T>() {
    const T* const data = static_cast<const T*>(grad.data_ptr());
    for (std::int64_t e = tile.first; e < tile.last;) {
      const std::int64_t n = e / p.elements, end = std::min((n + 1) * p.elements, tile.last);
      const A value = static_cast<A>(widen(data[n * grad.stride(0)]));
      for (; e < end; ++e) row[e - tile.first] = value;
    }
  });
}

// Half the box of each element of a tile.
template <class A>
void read_bounds(const Problem& p, const Tile& tile, A* row) {
  for (std::int64_t e = tile.first; e < tile.last; ++e) row[e - tile.first] = static_cast<A>(p.bounds[e % p.elements / p.positions]);
}

}  // namespace fastgen::rational_quadratic_spline
