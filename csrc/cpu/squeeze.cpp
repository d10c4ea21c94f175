// squeeze: blocks of f x f pixels as channels, and back: one copy.
//
// Elements are moved, whatever they are. Planes: a row of pixels is dealt out to f rows of the small image, or put together from them.
// Channels-last: where the channels of a place stay together, a row of a block is one run of memory; else channels are dealt out, those
// of a block of 2 x 2 pixels all four in one pass.
#include <algorithm>
#include <array>
#include <cstring>

#include "common/simd/deal.h"
#include "common/tensor.h"

namespace fastgen::squeeze {
namespace {

// In the order of SQUEEZE_ORDERS of fastgen/_schema.py.
enum class Order { kChannelMajor, kSpaceMajor, kCheckerboard };

struct Problem {
  std::int64_t n, channels, height, width, factor;  // of the large image
  Order order;

  // The channel of the small image that pixel (i, j) of a block of channel c becomes.
  std::int64_t channel(std::int64_t c, std::int64_t i, std::int64_t j) const {
    static constexpr std::int64_t kPlace[] = {0, 2, 3, 1};
    const std::int64_t place = i * factor + j;
    if (order == Order::kChannelMajor) return c * factor * factor + place;
    return (order == Order::kCheckerboard ? kPlace[place] : place) * channels + c;
  }
};

struct Strides {
  std::int64_t sample, channel, row, column;
  explicit Strides(const Tensor& t) : sample(t.stride(0)), channel(t.stride(1)), row(t.stride(2)), column(t.stride(3)) {}
};

// small[j][i] = large[i * f + j], or back; the rows of the small image as pointers.
template <bool kInverse, class T>
FASTGEN_INLINE void deal(T* __restrict large, T* const* small, std::int64_t count, std::int64_t factor) {
  for (std::int64_t j = 0; j < factor; ++j)
    for (std::int64_t i = 0; i < count; ++i) {
      if constexpr (kInverse) large[i * factor + j] = small[j][i];
      else small[j][i] = large[i * factor + j];
    }
}

// Bands of rows of a plane: one of the small image each.
template <bool kInverse, class T>
void move_planes(const Problem& p, T* large, const Strides& in_large, T* small, const Strides& in_small) {
  const std::int64_t f = p.factor, planes = p.n * p.channels, bands = p.height / f;
  parallel(planes, planes * p.height * p.width, [&](std::int64_t begin, std::int64_t end) {
    std::vector<T*> to(f);
    for (std::int64_t plane = begin; plane < end; ++plane) {
      const std::int64_t n = plane / p.channels, c = plane % p.channels;
      for (std::int64_t i = 0; i < f; ++i) {
        T* row = large + n * in_large.sample + c * in_large.channel + i * in_large.row;
        for (std::int64_t j = 0; j < f; ++j) to[j] = small + n * in_small.sample + p.channel(c, i, j) * in_small.channel;
        for (std::int64_t y = 0; y < bands; ++y, row += f * in_large.row) {
          if (f == 2) deal_two<kInverse>(row, to[0], to[1], p.width / 2);
          else deal<kInverse>(row, to.data(), p.width / f, f);
          for (T*& t : to) t += in_small.row;
        }
      }
    }
  });
}

// to[k * stride] = from[k], or back.
template <bool kInverse, class T>
FASTGEN_INLINE void spread(T* __restrict from, T* __restrict to, std::int64_t count, std::int64_t stride) {
  if (stride == 1) {
    if constexpr (kInverse) std::memcpy(from, to, count * sizeof(T));
    else std::memcpy(to, from, count * sizeof(T));
    return;
  }
  for (std::int64_t k = 0; k < count; ++k) {
    if constexpr (kInverse) from[k] = to[k * stride];
    else to[k * stride] = from[k];
  }
}

// The two rows of a band of blocks of 2 x 2 pixels, in the order of channels, as `count` pixels.
template <bool kInverse, class T>
void move_band(const Problem& p, T* upper, T* lower, std::int64_t large_column, T* small, std::int64_t small_column, std::int64_t count) {
  const bool three = p.channels == 3 && large_column == 3 && small_column == 12;
  for (std::int64_t x = 0; x < count; ++x, upper += 2 * large_column, lower += 2 * large_column, small += small_column) {
    if (three) deal_three_channels<kInverse>(upper, lower, small, x + 1 < count);
    else deal_four<!kInverse>(small, {upper, upper + large_column, lower, lower + large_column}, p.channels);
  }
}

template <bool kInverse, class T>
void move_channels_last(const Problem& p, T* large, const Strides& in_large, T* small, const Strides& in_small) {
  const std::int64_t f = p.factor, h = p.height / f, w = p.width / f;
  const std::int64_t step = p.order == Order::kChannelMajor ? f * f : 1;
  parallel(p.n * h, p.n * p.channels * p.height * p.width, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t n = item / h, y = item % h;
      T* const rows = large + n * in_large.sample + y * f * in_large.row;
      T* const row = small + n * in_small.sample + y * in_small.row;
      if (f == 2 && p.order == Order::kChannelMajor) {
        move_band<kInverse>(p, rows, rows + in_large.row, in_large.column, row, in_small.column, w);
        continue;
      }
      for (std::int64_t i = 0; i < f; ++i) {
        T *pixel = rows + i * in_large.row, *to = row;
        for (std::int64_t x = 0; x < w; ++x, to += in_small.column)
          for (std::int64_t j = 0; j < f; ++j, pixel += in_large.column) spread<kInverse>(pixel, to + p.channel(0, i, j), p.channels, step);
      }
    }
  });
}

template <class T>
void move(const Problem& p, const Tensor& input, Tensor& output, bool inverse, bool channels_last) {
  const Strides from(input), to(output);
  T *const in = static_cast<T*>(const_cast<void*>(input.data_ptr())), *const out = static_cast<T*>(output.mutable_data_ptr());
  if (channels_last && inverse) move_channels_last<true>(p, out, to, in, from);
  if (channels_last && !inverse) move_channels_last<false>(p, in, from, out, to);
  if (!channels_last && inverse) move_planes<true>(p, out, to, in, from);
  if (!channels_last && !inverse) move_planes<false>(p, in, from, out, to);
}

Tensor squeeze(const Tensor& input, std::int64_t factor, std::int64_t order, bool inverse) {
  check_floating("squeeze", "input", input);
  FASTGEN_CHECK(input.dim() == 4, "squeeze: input must be [N, C, H, W]");
  FASTGEN_CHECK(factor >= 1 && factor < (std::int64_t{1} << 31), "squeeze: factor must be positive, got ", factor);
  FASTGEN_CHECK(order >= 0 && order <= 2, "squeeze: order must be in [0, 3), got ", order);
  FASTGEN_CHECK(static_cast<Order>(order) != Order::kCheckerboard || factor == 2, "squeeze: the checkerboard has factor 2, got ", factor);
  const std::int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3), squared = factor * factor;
  FASTGEN_CHECK(!inverse || c % squared == 0, "squeeze: factor squared must divide the channels, got ", factor, " and ", c);
  FASTGEN_CHECK(inverse || (h % factor == 0 && w % factor == 0), "squeeze: factor must divide height and width, got ", factor, ", ", h, " and ", w);
  const Problem p{n, inverse ? c / squared : c, inverse ? h * factor : h, inverse ? w * factor : w, factor, static_cast<Order>(order)};
  const bool channels_last = is_channels_last(input);
  const std::vector<std::int64_t> sizes = inverse ? std::vector{n, p.channels, p.height, p.width} : std::vector{n, c * squared, h / factor, w / factor};
  Tensor output = empty_strided(sizes, dense_strides(sizes, channels_last), input.scalar_type());
  if (output.numel() == 0) return output;
  const std::int64_t along = channels_last ? 1 : 3;  // what must lie in order
  const Tensor x = input.stride(along) == 1 || input.size(along) == 1 ? input : copy_dense(input, channels_last);
  switch (input.scalar_type()) {
    case ScalarType::Double: move<std::uint64_t>(p, x, output, inverse, channels_last); break;
    case ScalarType::Float: move<std::uint32_t>(p, x, output, inverse, channels_last); break;
    default: move<std::uint16_t>(p, x, output, inverse, channels_last);
  }
  return output;
}

}  // namespace
}  // namespace fastgen::squeeze

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("squeeze", TORCH_BOX(&fastgen::squeeze::squeeze)); }
