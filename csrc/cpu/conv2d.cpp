// conv2d with packed weights: 3x3 by Winograd's F(4x4, 3x3) or F(2x2, 3x3), 1x1 as one matrix product; stride 1, the size kept.
//
//   output = (conv(act(input * input_scale + input_shift)) + bias + embedding + residual) * output_scale
//
// Rows of tiles are taken in groups whose transformed values and products stay in the last-level cache, each group in three steps
// that all threads share:
//   values:   a thread owns chunks of kChunk channels of rows of tiles. The rows of pixels below a row of tiles are staged once, in
//             fp32, channels innermost, whatever layout and dtype they have in memory, with the affine map and the activation
//             applied and zeros around the image; the transform runs over vectors of channels.
//   products: a thread owns points and panels of output channels (_product.cpp).
//   outputs:  a thread owns chunks of output channels of rows of tiles: transform, bias, embedding, residual and scale, one store.
// Which thread does what changes no sum: the bits are the same on any number of threads.
#include "conv2d.h"

#include <memory>

namespace fastgen::conv2d {
namespace {

constexpr std::int64_t kChunk = 32;                // channels that a transform takes at a time
// Values and products of a group of rows: half as much again as the packed weights, which each group reads once, within these. On an
// EPYC 7xx3 128 channels want 2 to 4 MiB (second-level caches), 320 channels at 64x64 24 MiB (one group: 0.8 of the time of three).
constexpr std::int64_t kLeastGroup = 2 << 20, kMostGroup = 64 << 20;
constexpr std::int64_t kAhead = 8;                 // pixels between what is staged and what is asked of memory, channels-last
constexpr std::int64_t kWidthF = kWidth<float>;

struct Problem {
  std::int64_t n, channels, outputs, height, width;
  bool channels_last, silu;
  float output_scale;
  Parameter input_scale, input_shift, bias, embedding;

  std::int64_t elements() const { return n * outputs * height * width; }
};

// A tensor [N, C, H, W] of any strides whose innermost dimension, channels or columns, is dense.
template <class T>
struct Image {
  T* data = nullptr;
  std::int64_t n = 0, c = 0, h = 0, w = 0;

  Image(const Tensor& t, T* first) : data(first), n(t.stride(0)), c(t.stride(1)), h(t.stride(2)), w(t.stride(3)) {}
  T* at(std::int64_t sample, std::int64_t channel, std::int64_t y, std::int64_t x) const {
    return data + sample * n + channel * c + y * h + x * w;
  }
};

// `t`, or a dense copy where its innermost dimension is not dense.
Tensor readable(const Tensor& t, bool channels_last) {
  const std::int64_t inner = channels_last ? 1 : 3;
  return t.size(inner) == 1 || t.stride(inner) == 1 ? t : copy_dense(t, channels_last);
}

// Rows of tiles of all samples, one after the other, in groups; values [points][tiles][C] and products [points][tiles][K] of one.
template <int m>
struct Groups {
  static constexpr std::int64_t points = Tile<m>::points;
  std::int64_t rows_of_image, tiles_of_row, rows, rows_of_group, tiles, value_stride, product_stride, values_of_point, products_of_point;

  explicit Groups(const Problem& p) {
    rows_of_image = ceil_div(p.height, m), tiles_of_row = ceil_div(p.width, m), rows = p.n * rows_of_image;
    value_stride = ceil_div(p.channels, kPanel) * kPanel, product_stride = ceil_div(p.outputs, kPanel) * kPanel;
    const std::int64_t bytes_of_row = points * tiles_of_row * (value_stride + product_stride) * 4;
    const std::int64_t weight_bytes = points * p.channels * product_stride * 4;
    const std::int64_t groups = ceil_div(rows * bytes_of_row, std::clamp(weight_bytes * 3 / 2, kLeastGroup, kMostGroup));
    rows_of_group = ceil_div(rows, std::min(groups, rows));
    tiles = rows_of_group * tiles_of_row;
    values_of_point = spread(tiles * value_stride), products_of_point = spread(tiles * product_stride);
  }

 private:
  // An odd number of cache lines, so that the points of a tile fall into different sets of a cache.
  static std::int64_t spread(std::int64_t floats) { return (floats / 16 | 1) * 16; }
};

// ---- values --------------------------------------------------------------------------------------------------------------

// The rows of pixels below a row of tiles, channels [first, first + count) of them: [side][columns][kChunk] in fp32.
template <int m, class T, bool kSilu>
class Stage {
  using G = Tile<m>;

 public:
  Stage(const Problem& p, const Image<const T>& x, std::int64_t tiles_of_row)
      : p_(p), x_(x), row_((tiles_of_row * m + 2 * G::halo) * kChunk), memory_(new float[G::side * row_]) {}

  const float* row(int i) const { return memory_.get() + i * row_; }

  void take_channels(std::int64_t sample, std::int64_t first, std::int64_t count) {
    sample_ = sample, first_ = first, count_ = count;
    p_.input_scale.read(sample, first, count, 1.0f, scale_);
    p_.input_shift.read(sample, first, count, 0.0f, shift_);
  }

  // The rows of pixels of a row of tiles; `next`: it lies below the last one, whose lowest rows are its first.
  void fill(std::int64_t row_of_tiles, bool next) {
    constexpr int shared = G::side - m;
    if (next && shared) std::memcpy(memory_.get(), row(m), shared * row_ * sizeof(float));
    for (int i = next ? shared : 0; i < G::side; ++i) fill_row(row_of_tiles * m + i - G::halo, memory_.get() + i * row_);
  }

 private:
  FASTGEN_INLINE static VecF map(VecF x, VecF scale, VecF shift) {
    const VecF y = madd<float>(x, scale, shift);
    if constexpr (kSilu) return silu<float>(y);
    return y;
  }

  void fill_row(std::int64_t y, float* out) const {
    if (y < 0 || y >= p_.height) {
      std::memset(out, 0, row_ * sizeof(float));
      return;
    }
    float* const inside = out + G::halo * kChunk;
    std::memset(out, 0, G::halo * kChunk * sizeof(float));
    std::memset(inside + p_.width * kChunk, 0, (row_ - (p_.width + G::halo) * kChunk) * sizeof(float));
    p_.channels_last ? fill_channels_last(y, inside) : fill_contiguous(y, inside);
  }

  void fill_channels_last(std::int64_t y, float* out) const {
    for (std::int64_t x = 0; x < p_.width; ++x, out += kChunk) {
      const T* const in = x_.at(sample_, first_, y, x);
      for (std::int64_t c = 0; c < count_; c += 64 / static_cast<std::int64_t>(sizeof(T))) prefetch(in + kAhead * x_.w + c);
      for_vectors<float>(count_, [&](std::int64_t c, auto at) {
        store(out + c, map(at.load(in + c), load(scale_ + c), load(shift_ + c)));
      });
    }
  }

  void fill_contiguous(std::int64_t y, float* out) const {
    for (std::int64_t c = 0; c < count_; c += kWidthF)
      for_vectors<float>(p_.width, [&](std::int64_t x, auto at) {
        VecF square[kWidthF];
        for (std::int64_t i = 0; i < kWidthF; ++i) {
          const std::int64_t channel = std::min(c + i, count_ - 1);  // beyond the last nothing is read later
          square[i] = map(at.load(x_.at(sample_, first_ + channel, y, x)), VecF(scale_[channel]), VecF(shift_[channel]));
        }
        transpose(square);
        for (std::int64_t i = 0; i < std::min(kWidthF, p_.width - x); ++i) store(out + (x + i) * kChunk + c, square[i]);
      });
  }

  const Problem& p_;
  const Image<const T>& x_;
  std::int64_t row_, sample_ = 0, first_ = 0, count_ = 0;
  std::unique_ptr<float[]> memory_;
  alignas(64) float scale_[kChunk] = {}, shift_[kChunk] = {};
};

// A row of tiles, `count` channels: the columns are transformed once and shared by neighbouring tiles, then each tile's rows.
template <int m, class S>
void transform_values(const S& stage, std::int64_t tiles, std::int64_t count, float* values, std::int64_t value_stride,
                      std::int64_t values_of_point) {
  using G = Tile<m>;
  alignas(64) float memory[G::side][G::side][kChunk];  // [column][point of y]
  float(*columns[G::side])[kChunk];
  for (int j = 0; j < G::side; ++j) columns[j] = memory[j];
  const auto take_column = [&](std::int64_t x, float(*column)[kChunk]) {
    for (std::int64_t c = 0; c < count; c += kWidthF) {
      VecF d[G::side], p[G::side];
      for (int i = 0; i < G::side; ++i) d[i] = load(stage.row(i) + x * kChunk + c);
      input_points<m>(d, p);
      for (int i = 0; i < G::side; ++i) store(column[i] + c, p[i]);
    }
  };
  for (int j = 0; j < G::side - m; ++j) take_column(j, columns[m + j]);
  for (std::int64_t t = 0; t < tiles; ++t, values += value_stride) {
    std::rotate(columns, columns + m, columns + G::side);
    for (int j = G::side - m; j < G::side; ++j) take_column(t * m + j, columns[j]);
    for (int i = 0; i < G::side; ++i)
      for (std::int64_t c = 0; c < count; c += kWidthF) {
        VecF d[G::side], p[G::side];
        for (int j = 0; j < G::side; ++j) d[j] = load(columns[j][i] + c);
        input_points<m>(d, p);
        for (int j = 0; j < G::side; ++j) store(values + (i * G::side + j) * values_of_point + c, p[j]);
      }
  }
}

template <int m, class T, bool kSilu>
void make_values(const Problem& p, const Groups<m>& g, const Image<const T>& x, std::int64_t first_row, std::int64_t rows, float* values) {
  const std::int64_t chunks = ceil_div(p.channels, kChunk);
  parallel(chunks * rows, rows * g.tiles_of_row * p.channels * Tile<m>::points, [&](std::int64_t begin, std::int64_t end) {
    Stage<m, T, kSilu> stage(p, x, g.tiles_of_row);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t chunk = i / rows, row = i % rows, sample = (first_row + row) / g.rows_of_image;
      const std::int64_t row_of_tiles = (first_row + row) % g.rows_of_image, first = chunk * kChunk;
      const std::int64_t count = std::min(kChunk, p.channels - first);
      const bool next = i > begin && row > 0 && row_of_tiles > 0;
      if (!next) stage.take_channels(sample, first, count);
      stage.fill(row_of_tiles, next);
      transform_values<m>(stage, g.tiles_of_row, count, values + row * g.tiles_of_row * g.value_stride + first, g.value_stride,
                          g.values_of_point);
    }
  });
}

// ---- products ------------------------------------------------------------------------------------------------------------

template <int m>
void make_products(const Problem& p, const Groups<m>& g, std::int64_t tiles, const float* values, const float* weights, float* products) {
  constexpr std::int64_t share = 4;  // panels that a thread takes at once, of one point
  const std::int64_t panels = g.product_stride / kPanel, shares = ceil_div(panels, share);
  parallel(g.points * shares, g.points * tiles * g.product_stride * p.channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t point = i / shares, first = i % shares * share;
      multiply({values + point * g.values_of_point, weights + point * panels * p.channels * kPanel, products + point * g.products_of_point,
                tiles, p.channels, g.value_stride, g.product_stride},
               first, std::min(first + share, panels));
    }
  });
}

// ---- outputs -------------------------------------------------------------------------------------------------------------

// What is added to a chunk of channels of a row of tiles, and where it goes.
template <class T>
struct Finish {
  const Problem& p;
  const Image<T>& output;
  const Image<const T>* residual;  // nullptr where there is none
  alignas(64) float base[kChunk] = {};  // bias + embedding

  void take_channels(std::int64_t sample, std::int64_t first, std::int64_t count) {
    alignas(64) float bias[kChunk];
    p.bias.read(0, first, count, 0.0f, bias);
    p.embedding.read(sample, first, count, 0.0f, base);
    for (std::int64_t c = 0; c < count; ++c) base[c] += bias[c];
  }

  // Neighbours along the innermost dimension: pixels or channels.
  template <class At>
  FASTGEN_INLINE void put(At at, VecF value, VecF added, std::int64_t n, std::int64_t c, std::int64_t y, std::int64_t x) const {
    value += added;
    if (residual) value += at.load(residual->at(n, c, y, x));
    at.store(output.at(n, c, y, x), value * p.output_scale);
  }
};

template <int m, class T>
void make_outputs(const Problem& p, const Groups<m>& g, std::int64_t first_row, std::int64_t rows, const float* products,
                  const Image<T>& output, const Image<const T>* residual) {
  using G = Tile<m>;
  const std::int64_t chunks = ceil_div(p.outputs, kChunk), columns = g.tiles_of_row * m;
  parallel(rows * chunks, rows * g.tiles_of_row * p.outputs * G::points, [&](std::int64_t begin, std::int64_t end) {
    Finish<T> finish{p, output, residual};
    const std::unique_ptr<float[]> staged(p.channels_last ? nullptr : new float[m * columns * kChunk]);  // [m][columns][kChunk]
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i / chunks, first = i % chunks * kChunk, count = std::min(kChunk, p.outputs - first);
      const std::int64_t sample = (first_row + row) / g.rows_of_image, top = (first_row + row) % g.rows_of_image * m;
      const std::int64_t height = std::min<std::int64_t>(m, p.height - top);
      finish.take_channels(sample, first, count);
      for (std::int64_t t = 0; t < g.tiles_of_row; ++t) {
        const float* const tile = products + (row * g.tiles_of_row + t) * g.product_stride + first;
        const std::int64_t left = t * m, width = std::min<std::int64_t>(m, p.width - left);
        for_vectors<float>(count, [&](std::int64_t c, auto at) {
          VecF half[m][G::side];  // [y][point of x]
          for (int j = 0; j < G::side; ++j) {
            VecF points[G::side], values[m];
            for (int k = 0; k < G::side; ++k) points[k] = load(tile + (k * G::side + j) * g.products_of_point + c);
            output_values<m>(points, values);
            for (int y = 0; y < m; ++y) half[y][j] = values[y];
          }
          const VecF added = load(finish.base + c);
          for (int y = 0; y < height; ++y) {
            VecF values[m];
            output_values<m>(half[y], values);
            for (int x = 0; x < width; ++x)
              if (p.channels_last) finish.put(at, values[x], added, sample, first + c, top + y, left + x);
              else store(staged.get() + (y * columns + left + x) * kChunk + c, values[x]);
          }
        });
      }
      if (p.channels_last) continue;
      for (std::int64_t c = 0; c < count; c += kWidthF)
        for (std::int64_t y = 0; y < height; ++y)
          for_vectors<float>(p.width, [&](std::int64_t x, auto at) {
            VecF square[kWidthF];
            for (std::int64_t k = 0; k < kWidthF; ++k)
              square[k] = load(staged.get() + (y * columns + std::min(x + k, p.width - 1)) * kChunk + c);
            transpose(square);
            for (std::int64_t k = 0; k < std::min(kWidthF, count - c); ++k)
              finish.put(at, square[k], VecF(finish.base[c + k]), sample, first + c + k, top + y, x);
          });
    }
  });
}

template <int m, class T, bool kSilu>
void forward(const Problem& p, const Tensor& input, const Tensor& packed, const Tensor* residual, Tensor& output) {
  const Groups<m> g(p);
  const Image<const T> x(input, static_cast<const T*>(input.data_ptr()));
  const Image<T> y(output, static_cast<T*>(output.mutable_data_ptr()));
  const std::optional<Image<const T>> r = residual ? std::optional(Image<const T>(*residual, static_cast<const T*>(residual->data_ptr())))
                                                   : std::nullopt;
  Tensor memory = empty_contiguous({g.points * (g.values_of_point + g.products_of_point)}, ScalarType::Float);
  float* const values = static_cast<float*>(memory.mutable_data_ptr());
  float* const products = values + g.points * g.values_of_point;
  const auto* const weights = static_cast<const float*>(packed.data_ptr());
  for (std::int64_t first = 0; first < g.rows; first += g.rows_of_group) {
    const std::int64_t rows = std::min(g.rows_of_group, g.rows - first);
    make_values<m, T, kSilu>(p, g, x, first, rows, values);
    make_products<m>(p, g, rows * g.tiles_of_row, values, weights, products);
    make_outputs<m, T>(p, g, first, rows, products, y, r ? &*r : nullptr);
  }
}

Tensor conv2d_packed(const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias, OptionalTensor input_scale,
                     OptionalTensor input_shift, std::int64_t activation, OptionalTensor embedding, OptionalTensor residual,
                     double output_scale) {
  const char* const op = "conv2d_packed";
  check_floating(op, "input", input);
  FASTGEN_CHECK(input.dim() == 4, op, ": input must be [N, C, H, W]");
  const ScalarType dtype = input.scalar_type();
  FASTGEN_CHECK(dtype != ScalarType::Double, op, ": input must be float32, bfloat16 or float16");
  FASTGEN_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 4 && packed.is_contiguous() && outputs_of(packed.size(0)) > 0,
                op, ": packed must be what conv2d_pack returns");
  const std::int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  FASTGEN_CHECK(packed.size(1) == ceil_div(out_channels, kPanel) && packed.size(2) == c && packed.size(3) == kPanel && out_channels >= 1, op,
                ": packed must be for ", c, " channels and out_channels=", out_channels);
  FASTGEN_CHECK(activation == 0 || activation == 1, op, ": activation must be 0 (none) or 1 (silu), got ", activation);
  const Problem p{n, c, out_channels, h, w, is_channels_last(input), activation == 1, static_cast<float>(output_scale),
                  Parameter(op, "input_scale", input_scale, true, n, c), Parameter(op, "input_shift", input_shift, true, n, c),
                  Parameter(op, "bias", bias, false, n, out_channels), Parameter(op, "embedding", embedding, true, n, out_channels)};
  const std::vector<std::int64_t> sizes = {n, out_channels, h, w};
  if (residual.has_value())
    FASTGEN_CHECK(residual->scalar_type() == dtype && sizes_of(*residual) == sizes, op, ": residual must have the dtype of input and shape [",
                  n, ", ", out_channels, ", ", h, ", ", w, "]");
  Tensor output = empty_strided(sizes, dense_strides(sizes, p.channels_last), dtype);
  if (p.elements() == 0) return output;
  const Tensor x = readable(input, p.channels_last);
  const OptionalTensor r = residual.has_value() ? OptionalTensor(readable(*residual, p.channels_last)) : std::nullopt;
  dispatch_tile(outputs_of(packed.size(0)), [&]<int m>() {
    const auto run = [&]<class T>() {
      p.silu ? forward<m, T, true>(p, x, packed, r ? &*r : nullptr, output) : forward<m, T, false>(p, x, packed, r ? &*r : nullptr, output);
    };
    if (dtype == ScalarType::Float) run.template operator()<float>();
    if (dtype == ScalarType::BFloat16) run.template operator()<BFloat16>();
    if (dtype == ScalarType::Half) run.template operator()<Float16>();
  });
  return output;
}

}  // namespace
}  // namespace fastgen::conv2d

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("conv2d_packed", TORCH_BOX(&fastgen::conv2d::conv2d_packed)); }
