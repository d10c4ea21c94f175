// What a convolution with packed weights is given, whichever way it computes: the problem, its images, and rows of pixels as its first
// step stages them.
//
// The pixels of a row are read once: the affine map and the activation are applied in fp32, and kChunk channels of each lie innermost
// in what is staged, whatever layout and dtype they have in memory.
#pragma once

#include "_product.h"
#include "common/scratch.h"
#include "common/tensor.h"

namespace fastgen::convolution {

inline constexpr std::int64_t kChunk = 32;  // channels that are staged at a time
inline constexpr std::int64_t kAhead = 8;  // pixels between what is staged and what is asked of memory, channels-last
inline constexpr std::int64_t kWidthF = kWidth<float>;

// The image whose channels come after those of the input, from `seam` on, of the input's dtype; `data` is null where there is none.
struct Beside {
  const void* data = nullptr;
  std::int64_t seam = 0, n = 0, c = 0, h = 0, w = 0;
};

// Height and width are those of the input; the output has `scale` times as many rows and columns. Channels are those of both images.
struct Problem {
  std::int64_t n, channels, outputs, height, width;
  bool channels_last, silu;
  float output_scale;
  Parameter input_scale, input_shift, bias, embedding;
  Beside beside;
};

// A tensor [N, C, H, W] of any strides whose innermost dimension, channels or columns, is dense.
template <class T>
struct Image {
  T* data = nullptr;
  std::int64_t n = 0, c = 0, h = 0, w = 0;

  Image(const Tensor& t, T* first) : data(first), n(t.stride(0)), c(t.stride(1)), h(t.stride(2)), w(t.stride(3)) {}
  explicit Image(const Beside& b) : data(static_cast<T*>(b.data)), n(b.n), c(b.c), h(b.h), w(b.w) {}
  T* at(std::int64_t sample, std::int64_t channel, std::int64_t y, std::int64_t x) const {
    return data + sample * n + channel * c + y * h + x * w;
  }
};

template <class T>
Image<const T> image_of(const Tensor& t) {
  return {t, static_cast<const T*>(t.data_ptr())};
}
template <class T>
std::optional<Image<const T>> image_of(const OptionalTensor& t) {
  return t.has_value() ? std::optional(image_of<T>(*t)) : std::nullopt;
}

// `t`, or a dense copy where its innermost dimension is not dense.
inline Tensor readable(const Tensor& t, bool channels_last) {
  const std::int64_t inner = channels_last ? 1 : 3;
  return t.size(inner) == 1 || t.stride(inner) == 1 ? t : copy_dense(t, channels_last);
}

// Rows of pixels, channels [first, first + count) of one sample: [width][kChunk], zero in the channels past the last.
template <class T, bool kSilu>
class Source {
 public:
  Source(const Problem& p, const Image<const T>& x) : p_(p), x_(x), beside_(p.beside) {}

  void take_channels(std::int64_t sample, std::int64_t first, std::int64_t count) {
    sample_ = sample, first_ = first, count_ = count;
    of_x_ = p_.beside.data ? std::clamp<std::int64_t>(p_.beside.seam - first, 0, count) : count;
    p_.input_scale.read(sample, first, count, 1.0f, scale_);
    p_.input_shift.read(sample, first, count, 0.0f, shift_);
    std::fill(scale_ + count, scale_ + kChunk, 0.0f);
    std::fill(shift_ + count, shift_ + kChunk, 0.0f);
  }

  template <class S>
  void read_row(std::int64_t y, S* out) const {
    p_.channels_last ? read_channels_last(y, out) : read_contiguous(y, out);
  }

 private:
  // For a row of S: bfloat16 has no more than eight bits.
  template <class S>
  FASTGEN_INLINE static VecF map(VecF x, VecF scale, VecF shift) {
    const VecF y = madd<float>(x, scale, shift);
    if constexpr (kSilu) return silu<float, std::is_same_v<S, BFloat16>>(y);
    return y;
  }

  // Where channel `c` of those taken begins in a row.
  const T* row(std::int64_t c, std::int64_t y) const {
    return c < of_x_ ? x_.at(sample_, first_ + c, y, 0) : beside_.at(sample_, first_ + c - p_.beside.seam, y, 0);
  }

  // Channels of both images.
  template <class S>
  void read_both_channels_last(std::int64_t y, S* out) const {
    const T *low = row(0, y), *high = row(of_x_, y);
    for (std::int64_t x = 0; x < p_.width; ++x, out += kChunk, low += x_.w, high += beside_.w) {
      for (std::int64_t c = 0; c < kChunk; c += kWidthF) store(out + c, VecF(0.0f));
      for_vectors<float>(of_x_, [&](std::int64_t c, auto at) {
        at.store(out + c, map<S>(at.load(low + c), at.load(scale_ + c), at.load(shift_ + c)));
      });
      for_vectors<float>(count_ - of_x_, [&](std::int64_t i, auto at) {
        const std::int64_t c = of_x_ + i;
        at.store(out + c, map<S>(at.load(high + i), at.load(scale_ + c), at.load(shift_ + c)));
      });
    }
  }

  template <class S>
  void read_channels_last(std::int64_t y, S* out) const {
    if (of_x_ > 0 && of_x_ < count_) return read_both_channels_last(y, out);
    const std::int64_t step = of_x_ > 0 ? x_.w : beside_.w;
    const T* in = row(0, y);
    for (std::int64_t x = 0; x < p_.width; ++x, out += kChunk, in += step) {
      for (std::int64_t c = 0; c < count_; c += 64 / static_cast<std::int64_t>(sizeof(T))) prefetch(in + kAhead * step + c);
      for_vectors<float>(count_, [&](std::int64_t c, auto at) {
        store(out + c, map<S>(at.load(in + c), load(scale_ + c), load(shift_ + c)));
      });
      for (std::int64_t c = ceil_div(count_, kWidthF) * kWidthF; c < kChunk; c += kWidthF) store(out + c, VecF(0.0f));
    }
  }

  template <class S>
  void read_contiguous(std::int64_t y, S* out) const {
    for (std::int64_t c = 0; c < kChunk; c += kWidthF)
      for_vectors<float>(p_.width, [&](std::int64_t x, auto at) {
        VecF square[kWidthF];
        for (std::int64_t i = 0; i < kWidthF; ++i) {
          const std::int64_t channel = c + i;
          square[i] = VecF(0.0f);
          if (channel < count_) square[i] = map<S>(at.load(row(channel, y) + x), VecF(scale_[channel]), VecF(shift_[channel]));
        }
        transpose(square);
        for (std::int64_t i = 0; i < std::min(kWidthF, p_.width - x); ++i) store(out + (x + i) * kChunk + c, square[i]);
      });
  }

  const Problem& p_;
  const Image<const T>& x_;
  Image<const T> beside_;
  std::int64_t sample_ = 0, first_ = 0, count_ = 0, of_x_ = 0;  // of the channels taken those of x_ come first
  alignas(64) float scale_[kChunk] = {}, shift_[kChunk] = {};
};

// The arguments of an op, checked, and what comes of them.
struct Call {
  Problem problem;
  Tensor input, output;
  OptionalTensor residual, skip;
};

inline void check_input(const char* op, const Tensor& input) {
  check_floating(op, "input", input);
  FASTGEN_CHECK(input.dim() == 4, op, ": input must be [N, C, H, W]");
}

// The channels of the input and of the image beside it.
inline std::int64_t check_skip(const char* op, const Tensor& input, const OptionalTensor& skip) {
  if (!skip.has_value()) return input.size(1);
  const bool fits = skip->scalar_type() == input.scalar_type() && skip->dim() == 4 && skip->size(0) == input.size(0) &&
                    skip->size(2) == input.size(2) && skip->size(3) == input.size(3);
  FASTGEN_CHECK(fits, op, ": skip must have the dtype and the shape of input, but for the channels");
  return input.size(1) + skip->size(1);
}

// Once input and packed weights are what they must be; `c`: what check_skip returns.
template <int scale>
Call make_call(const char* op, const Tensor& input, const OptionalTensor& skip, std::int64_t c, std::int64_t out_channels,
               const OptionalTensor& bias, const OptionalTensor& input_scale, const OptionalTensor& input_shift, std::int64_t activation,
               const OptionalTensor& embedding, const OptionalTensor& residual, double output_scale) {
  const std::int64_t n = input.size(0), h = input.size(2), w = input.size(3);
  FASTGEN_CHECK(activation == 0 || activation == 1, op, ": activation must be 0 (none) or 1 (silu), got ", activation);
  Problem p{n, c, out_channels, h, w, is_channels_last(input), activation == 1, static_cast<float>(output_scale),
                  Parameter(op, "input_scale", input_scale, true, n, c), Parameter(op, "input_shift", input_shift, true, n, c),
                  Parameter(op, "bias", bias, false, n, out_channels), Parameter(op, "embedding", embedding, true, n, out_channels), {}};
  const std::vector<std::int64_t> sizes = {n, out_channels, h * scale, w * scale};
  if (residual.has_value())
    FASTGEN_CHECK(residual->scalar_type() == input.scalar_type() && sizes_of(*residual) == sizes, op,
                  ": residual must have the dtype of input and shape [", n, ", ", out_channels, ", ", h * scale, ", ", w * scale, "]");
  Tensor output = empty_strided(sizes, dense_strides(sizes, p.channels_last), input.scalar_type());
  if (output.numel() == 0) return {p, input, output, residual, skip};
  const auto read = [&](const OptionalTensor& t) { return t.has_value() ? OptionalTensor(readable(*t, p.channels_last)) : std::nullopt; };
  Call call{p, readable(input, p.channels_last), output, read(residual), read(skip)};
  if (const OptionalTensor& s = call.skip; s.has_value())
    call.problem.beside = {s->data_ptr(), input.size(1), s->stride(0), s->stride(1), s->stride(2), s->stride(3)};
  return call;
}

}  // namespace fastgen::convolution
