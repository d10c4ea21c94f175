// Images [N, C, H, W] of any strides read and written a tile of pixels at a time, one row of memory a channel: neighbours in a
// vector are pixels, whichever way the image lies.
#pragma once

#include "common/tensor.h"

namespace fastgen {

// Where the pixels of one image stand, counted row by row; `step` apart where that is all there is to say.
struct Pixels {
  std::int64_t sample = 0, channel = 0, row = 0, column = 0, width = 1, count = 0, step = 0;
  bool even = false;  // one step from each pixel to the next

  explicit Pixels(const Tensor& t)
      : sample(t.stride(0)), channel(t.stride(1)), row(t.stride(2)), column(t.stride(3)), width(std::max<std::int64_t>(t.size(3), 1)),
        count(t.size(2) * t.size(3)) {
    even = t.size(2) <= 1 || t.size(3) <= 1 || row == width * column;
    step = t.size(3) <= 1 ? row : column;
  }

  std::int64_t at(std::int64_t pixel) const { return even ? pixel * step : pixel / width * row + pixel % width * column; }
};

// Pixels [first, first + count) of one image at `data`: row c of `rows`, `tile` long, is channel c. What is past the last pixel
// is zero.
template <class A, class T>
void read_pixels(const T* data, const Pixels& pixels, std::int64_t first, std::int64_t count, std::int64_t channels, std::int64_t tile,
                 A* rows) {
  if (count < tile)
    for (std::int64_t c = 0; c < channels; ++c) std::fill(rows + c * tile + count, rows + (c + 1) * tile, A(0));
  if constexpr (std::is_same_v<opmath_t<T>, A>) {
    if (pixels.even && pixels.step == 1) {
      for (std::int64_t c = 0; c < channels; ++c) {
        const T* from = data + c * pixels.channel + first;
        for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(rows + c * tile + i, at.load(from + i)); });
      }
      return;
    }
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const T* from = data + pixels.at(first + i);
    for (std::int64_t c = 0; c < channels; ++c) rows[c * tile + i] = static_cast<A>(widen(from[c * pixels.channel]));
  }
}

// The same of an image of any dtype.
template <class A>
void read_pixels(const char* op, const Tensor& t, const Pixels& pixels, std::int64_t n, std::int64_t first, std::int64_t count,
                 std::int64_t tile, A* rows) {
  dispatch_dtype(op, t.scalar_type(), [&]<class T>() {
    const T* data = static_cast<const T*>(t.data_ptr()) + n * pixels.sample;
    read_pixels<A>(data, pixels, first, count, t.size(1), tile, rows);
  });
}

// The way back, each element rounded once.
template <class A, class T>
void write_pixels(T* data, const Pixels& pixels, std::int64_t first, std::int64_t count, std::int64_t channels, std::int64_t tile,
                  const A* rows) {
  static_assert(std::is_same_v<opmath_t<T>, A>);
  if (pixels.even && pixels.step == 1) {
    for (std::int64_t c = 0; c < channels; ++c) {
      T* to = data + c * pixels.channel + first;
      for_vectors<A>(count, [&](std::int64_t i, auto at) { at.store(to + i, at.load(rows + c * tile + i)); });
    }
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    T* to = data + pixels.at(first + i);
    for (std::int64_t c = 0; c < channels; ++c) to[c * pixels.channel] = narrow<T>(rows[c * tile + i]);
  }
}

}  // namespace fastgen
