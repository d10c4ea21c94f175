// Moments of the channels of an output, gathered as it is stored, for the norm that reads it next.
//
// An image is taken in pieces of whole rows of pixels. The thread that has stored some channels of a piece reads them back, from its
// caches, as they are stored: sums of deviations from a number that is near their mean, and of the squares of these, in fp32. Pieces
// depend on the shape alone and are merged in order in fp64, so the bits depend on no number of threads.
#pragma once

#include <limits>

#include "_convolution_problem.h"
#include "common/moments.h"

namespace fastgen::convolution {

// Rows of pixels that make a piece where a thread reads what is stored in the second-level cache: so many pixels at least.
inline std::int64_t rows_of_piece(std::int64_t height, std::int64_t pixels_of_row) {
  constexpr std::int64_t least = 512;
  return std::min(ceil_div(least, pixels_of_row), height);
}

// Of dense images [N, C, H, W].
class Gathered {
 public:
  // Rows of pixels of a piece: so many, or fewer at the end of an image.
  Gathered(const Tensor& output, bool channels_last, std::int64_t rows)
      : n_(output.size(0)), channels_(output.size(1)), height_(output.size(2)), width_(output.size(3)), rows_(rows), last_(channels_last),
        pieces_(ceil_div(height_, rows)), parts_(n_ * pieces_ * 2 * channels_) {}

  // Of rows of tiles or pixels of all samples, `period` apart, of which `height` are an image's and `rows` make a piece: the pieces whose
  // last row is above the `row`-th.
  std::int64_t pieces_above(std::int64_t row, std::int64_t period, std::int64_t height, std::int64_t rows) const {
    const std::int64_t y = row % period;
    return row / period * pieces_ + (y >= height ? pieces_ : y / rows);
  }

  // Channels [first, first + count) of a piece of a sample have been stored.
  template <class T>
  void take(const T* output, std::int64_t sample, std::int64_t piece, std::int64_t first, std::int64_t count) const {
    const std::int64_t top = piece * rows_, pixels = pixels_of(piece), plane = height_ * width_;
    double *const mean = part(sample, piece) + first, *const m2 = mean + channels_;
    if (last_) {
      const T* const x = output + (sample * plane + top * width_) * channels_ + first;
      for_vectors<float>(count, [&](std::int64_t c, auto at) { columns(at, x + c, pixels, std::min(kWidthF, count - c), mean + c, m2 + c); });
      return;
    }
    const T* const x = output + (sample * channels_ + first) * plane + top * width_;
    for (std::int64_t c = 0; c < count; c += kWidthF) rows(x + c * plane, plane, pixels, std::min(kWidthF, count - c), mean + c, m2 + c);
  }

  // All channels of the pieces [first, last) of all samples, which threads share: each the channels that it has stored, or the pieces.
  template <class T>
  void take_all(const T* output, std::int64_t first, std::int64_t last, bool by_channels) const {
    const std::int64_t count = last - first, chunks = ceil_div(channels_, kChunk);
    parallel(chunks * count, count * rows_ * width_ * channels_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t piece = first + (by_channels ? i % count : i / chunks), channel = (by_channels ? i / count : i % chunks) * kChunk;
        take(output, piece / pieces_, piece % pieces_, channel, std::min(kChunk, channels_ - channel));
      }
    });
  }

  // [N, C, 3] of all pieces: mean, sum of squared deviations, and a value where one is watched.
  template <class T>
  void merge(const T* output, double* to) const {
    const std::int64_t shares = ceil_div(channels_, kShare);
    parallel(n_ * shares, n_ * pieces_ * channels_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t sample = i / shares, first = i % shares * kShare;
        merge_share(sample, first, std::min(kShare, channels_ - first), to + (sample * channels_ + first) * 3);
      }
    });
    const std::int64_t plane = height_ * width_;
    for_watched(n_ * channels_, plane, [&](std::int64_t row, std::int64_t place) {
      const std::int64_t sample = row / channels_, channel = row % channels_;
      to[row * 3 + 2] = widen(output[last_ ? (sample * plane + place) * channels_ + channel : row * plane + place]);
    });
  }

 private:
  static constexpr std::int64_t kShare = 64;  // channels that a thread merges at a time
  static constexpr std::int64_t kFew = 16;    // pixels whose mean is near that of all

  double* part(std::int64_t sample, std::int64_t piece) const { return parts_.get() + (sample * pieces_ + piece) * 2 * channels_; }
  std::int64_t pixels_of(std::int64_t piece) const { return std::min(rows_, height_ - piece * rows_) * width_; }

  // Sums over a vector of channels: of deviations from `centre`, and of their squares.
  struct Sums {
    VecF centre, rest, squares;

    // Sums of squares of deviations from the mean; false where the centre is so far from it that digits are lost, and then better.
    bool settle(std::int64_t pixels) {
      const VecF missed = rest * (1.0f / static_cast<float>(pixels)), lost = missed * rest;
      squares -= lost;
      stdx::where(squares < 0.0f, squares) = 0.0f;  // NaN stays
      if (!stdx::any_of(lost > squares)) return true;
      centre += missed;
      return false;
    }
    void put(std::int64_t pixels, std::int64_t lanes, double* mean, double* m2) const {
      alignas(64) float of_centre[kWidthF], of_rest[kWidthF], of_squares[kWidthF];
      store(of_centre, centre), store(of_rest, rest), store(of_squares, squares);
      const double share = 1.0 / static_cast<double>(pixels);
      for (std::int64_t k = 0; k < lanes; ++k) mean[k] = of_centre[k] + of_rest[k] * share, m2[k] = of_squares[k];
    }
  };

  // Of channels that lie innermost, of which `lanes` are there.
  template <class T, class At>
  void columns(At at, const T* x, std::int64_t pixels, std::int64_t lanes, double* mean, double* m2) const {
    const std::int64_t few = std::min(kFew, pixels);
    Sums sums{VecF(0.0f), VecF(0.0f), VecF(0.0f)};
    for (std::int64_t i = 0; i < few; ++i) sums.centre += at.load(x + i * pixels / few * channels_);
    sums.centre *= 1.0f / static_cast<float>(few);
    for (int times = 0; times < 2; ++times) {
      VecF sum[4] = {VecF(0.0f), VecF(0.0f), VecF(0.0f), VecF(0.0f)}, square[4] = {VecF(0.0f), VecF(0.0f), VecF(0.0f), VecF(0.0f)};
      const auto take = [&](int j, const T* from) {
        const VecF d = at.load(from) - sums.centre;
        sum[j] += d, square[j] = madd<float>(d, d, square[j]);
      };
      const T* from = x;
      std::int64_t i = 0;
      for (; i + 4 <= pixels; i += 4, from += 4 * channels_)
        for (int j = 0; j < 4; ++j) take(j, from + j * channels_);
      for (; i < pixels; ++i, from += channels_) take(0, from);
      sums.rest = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      sums.squares = (square[0] + square[1]) + (square[2] + square[3]);
      if (sums.settle(pixels)) break;
    }
    sums.put(pixels, lanes, mean, m2);
  }

  // Of `lanes` channels whose pixels lie innermost, `plane` apart.
  template <class T>
  void rows(const T* x, std::int64_t plane, std::int64_t pixels, std::int64_t lanes, double* mean, double* m2) const {
    alignas(64) float centres[kWidthF] = {};
    for (std::int64_t k = 0; k < lanes; ++k)
      for (std::int64_t i = 0; i < 4; ++i) centres[k] += 0.25f * widen(x[k * plane + i * pixels / 4]);
    Sums sums{load(centres), VecF(0.0f), VecF(0.0f)};
    for (int times = 0; times < 2; ++times) {
      store(centres, sums.centre);
      VecF sum[kWidthF], square[kWidthF];
      for (std::int64_t k = 0; k < kWidthF; ++k) sum[k] = square[k] = VecF(0.0f);
      for (std::int64_t k = 0; k < lanes; ++k) {
        const VecF centre = in_all_lanes(centres[k]);
        const T* const from = x + k * plane;
        VecF rest[2] = {VecF(0.0f), VecF(0.0f)}, squares[2] = {VecF(0.0f), VecF(0.0f)};
        const auto take = [&](int j, VecF d) { rest[j] += d, squares[j] = madd<float>(d, d, squares[j]); };
        std::int64_t i = 0;
        for (; i + 2 * kWidthF <= pixels; i += 2 * kWidthF)
          for (int j = 0; j < 2; ++j) take(j, load(from + i + j * kWidthF) - centre);
        for_vectors<float>(pixels - i, [&](std::int64_t l, auto at) { take(0, at.template keep<float>(at.load(from + i + l) - centre)); });
        sum[k] = rest[0] + rest[1], square[k] = squares[0] + squares[1];
      }
      transpose(sum), transpose(square);
      for (std::int64_t half = kWidthF / 2; half > 0; half /= 2)
        for (std::int64_t k = 0; k < half; ++k) sum[k] += sum[k + half], square[k] += square[k + half];
      sums.rest = sum[0], sums.squares = square[0];
      if (sums.settle(pixels)) break;
    }
    sums.put(pixels, lanes, mean, m2);
  }

  void merge_share(std::int64_t sample, std::int64_t first, std::int64_t count, double* to) const {
    double mean[kShare] = {}, m2[kShare] = {};
    const double share = 1.0 / static_cast<double>(height_ * width_);
    for (std::int64_t piece = 0; piece < pieces_; ++piece) {
      const double* const of = part(sample, piece) + first;
      const double weight = static_cast<double>(pixels_of(piece)) * share;
      for (std::int64_t c = 0; c < count; ++c) mean[c] += of[c] * weight;
    }
    for (std::int64_t piece = 0; piece < pieces_; ++piece) {
      const double *const of = part(sample, piece) + first, *const squares = of + channels_;
      const auto weight = static_cast<double>(pixels_of(piece));
      for (std::int64_t c = 0; c < count; ++c) {
        const double delta = of[c] - mean[c];
        m2[c] += squares[c] + weight * delta * delta;
      }
    }
    for (std::int64_t c = 0; c < count; ++c) to[c * 3] = mean[c], to[c * 3 + 1] = m2[c], to[c * 3 + 2] = 0;
  }

  std::int64_t n_, channels_, height_, width_, rows_;
  bool last_;
  std::int64_t pieces_;
  Scratch<double> parts_;  // [N][pieces][mean, squares][C]
};

// [N, C, 3] for an output, as of one without a pixel.
inline Tensor empty_moments(const Tensor& output) {
  Tensor moments = empty_contiguous({output.size(0), output.size(1), 3}, ScalarType::Double);
  if (output.numel() > 0) return moments;
  auto* const to = static_cast<double*>(moments.mutable_data_ptr());
  for (std::int64_t i = 0; i < moments.numel(); ++i) to[i] = i % 3 == 0 ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  return moments;
}

}  // namespace fastgen::convolution
