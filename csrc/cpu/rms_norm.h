// What forward and backward of rms_norm share. The input lies in one of two ways: in rows, a slice after the other (the last dimension,
// or the channels of a channels-last image), or in planes, a channel after the other, where a vector holds neighbouring pixels.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/slices.h"

namespace fastgen::rms_norm {

struct Problem {
  std::int64_t axis;
  bool rows, channels_last, silu;  // channels_last: the layout of what has the shape of the input
  SliceSizes sizes;
  Modulation modulation;
  double largest;  // rstd, that of `min_norm`

  Problem(const Tensor& input, bool over_channels, const OptionalTensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
          double min_norm, std::int64_t activation)
      : axis(axis_of(input, over_channels)), channels_last(over_channels && is_channels_last(input)), silu(activation == 1), sizes(input, axis),
        modulation{Parameter("rms_norm", "weight", weight, false, sizes.n, sizes.size), Parameter("rms_norm", "bias", {}, false, 0, 0),
                   Parameter("rms_norm", "scale", scale, true, sizes.n, sizes.size),
                   Parameter("rms_norm", "shift", shift, true, sizes.n, sizes.size)},
        largest(min_norm > 0 ? std::sqrt(static_cast<double>(sizes.size)) / min_norm : std::numeric_limits<double>::infinity()) {
    FASTGEN_CHECK(activation == 0 || activation == 1, "rms_norm: activation must be 0 (none) or 1 (silu), got ", activation);
    FASTGEN_CHECK(min_norm >= 0, "rms_norm: min_norm must not be negative, got ", min_norm);
    rows = axis == input.dim() - 1 || channels_last || sizes.count == 1;
  }

 private:
  static std::int64_t axis_of(const Tensor& t, bool over_channels) {
    FASTGEN_CHECK(t.dim() >= 2, "rms_norm: input must be [N, *, C] or [N, C, *spatial]");
    check_floating("rms_norm", "input", t);
    return over_channels ? 1 : t.dim() - 1;
  }
};

// One over the root of the mean square, at most `largest`; a NaN stays.
inline double rstd_of(double mean_square, double eps, double largest) { return std::min(1.0 / std::sqrt(mean_square + eps), largest); }

// The sizes of the statistics: those of the input less the axis.
inline std::vector<std::int64_t> statistics_of(const Tensor& input, std::int64_t axis) {
  auto sizes = sizes_of(input);
  sizes.erase(sizes.begin() + axis);
  return sizes;
}

// Pixels of a tile of planes: in fp32 a quarter of a megabyte, whose second read the second-level cache answers.
constexpr std::int64_t kTile = 65536;
inline std::int64_t tile_pixels(const Problem& p) {
  const std::int64_t fit = kTile / p.sizes.size / 64 * 64;
  return std::min(std::clamp<std::int64_t>(fit, 64, 1024), p.sizes.count);
}

// bf16 has 8 bits: a 14-bit reciprocal and a cubic exponential are exact enough for it.
template <class T>
inline constexpr bool kLowPrecision = std::is_same_v<T, BFloat16>;

}  // namespace fastgen::rms_norm
