// What forward and backward of masked_conv2d share: the taps that a mask leaves and who sees them, as fastgen/reference/_masked_taps.py
// says it, and images in fp32 with the zeros that the taps reach into around them.
#pragma once

#include <algorithm>

#include "_product.h"
#include "common/scratch.h"
#include "common/tensor.h"

namespace fastgen::masked {

// In the order of MASK_TYPES of fastgen/_schema.py.
enum class MaskType { kA, kB, kVerticalA, kVerticalB, kHorizontalA, kHorizontalB, kDown, kDownRight };

// A rectangle of taps by its first row and column.
struct Rectangle {
  std::int64_t row, rows, column, columns;
};

// Outputs [first, last), all of one group and one color, which see the channels [low, high) of their group at the ordered tap.
struct Run {
  std::int64_t first, last, group, low, high;
};

// The taps [first, last) of a kernel in raster order, of which (y, x) lies on the output. `transposed` is the mask of the gradient of
// the input: the kernel turned round, outputs and inputs having changed places.
struct Mask {
  std::int64_t height, width, y, x, first, last, groups, colors, outputs, inputs;
  bool own, transposed = false;  // own: a color sees itself

  Mask(const char* op, const std::vector<std::int64_t>& kernel, std::int64_t type, std::int64_t groups, std::int64_t colors,
       std::int64_t outputs, std::int64_t inputs)
      : groups(groups), colors(colors), outputs(outputs), inputs(inputs) {
    FASTGEN_CHECK(type >= 0 && type <= static_cast<std::int64_t>(MaskType::kDownRight), op, ": mask_type must be an index of MASK_TYPES, got ", type);
    constexpr std::int64_t most = 1 << 20;
    FASTGEN_CHECK(kernel.size() == 2 && std::min(kernel[0], kernel[1]) >= 1 && std::max(kernel[0], kernel[1]) <= most, op,
                  ": kernel must be two integers in [1, 2^20]");
    height = kernel[0], width = kernel[1];
    const auto mask = static_cast<MaskType>(type);
    const bool right = mask == MaskType::kDownRight, shifted = right || mask == MaskType::kDown;
    FASTGEN_CHECK((shifted || height % 2 == 1) && (right || width % 2 == 1), op, ": kernel must be odd for this mask, got ", height, "x", width);
    FASTGEN_CHECK(groups >= 1 && outputs >= 1 && inputs >= 1 && outputs % groups == 0 && inputs % groups == 0, op,
                  ": groups must divide the channels, got groups=", groups, " and channels ", outputs, " and ", inputs);
    FASTGEN_CHECK(colors >= 1 && outputs % colors == 0 && inputs % colors == 0, op, ": color_channels must divide the channels, got color_channels=",
                  colors, " and channels ", outputs, " and ", inputs);
    const bool vertical = mask == MaskType::kVerticalA || mask == MaskType::kVerticalB;
    FASTGEN_CHECK(colors == 1 || (!shifted && !vertical), op, ": color_channels must be 1 for this mask, got ", colors);
    own = mask == MaskType::kB || mask == MaskType::kHorizontalB;
    y = shifted ? height - 1 : height / 2, x = right ? width - 1 : width / 2;
    const std::int64_t row = height / 2 * width;
    first = mask == MaskType::kHorizontalA || mask == MaskType::kHorizontalB ? row : 0;
    last = shifted ? height * width : vertical ? row + (mask == MaskType::kVerticalB ? width : 0) : row + width / 2 + (own || colors > 1);
  }

  Mask turned() const {
    Mask m = *this;
    m.y = height - 1 - y, m.x = width - 1 - x, m.first = height * width - last, m.last = height * width - first;
    std::swap(m.outputs, m.inputs), m.transposed = !transposed;
    return m;
  }

  std::int64_t taps() const { return last - first; }
  std::int64_t seen() const { return inputs / groups; }  // channels
  bool ordered() const { return colors > 1; }
  std::int64_t ordered_tap() const { return transposed ? 0 : taps() - 1; }

  std::vector<Run> runs() const {
    std::vector<std::int64_t> cuts;
    for (const std::int64_t parts : {groups, colors})
      for (std::int64_t k = 0; k <= parts; ++k) cuts.push_back(k * (outputs / parts));
    std::sort(cuts.begin(), cuts.end());
    std::vector<Run> found;
    for (std::size_t i = 1; i < cuts.size(); ++i) {
      if (cuts[i] == cuts[i - 1]) continue;
      const std::int64_t begin = cuts[i - 1], group = begin / (outputs / groups), color = begin / (outputs / colors);
      const std::int64_t edge = std::clamp<std::int64_t>((color + (own != transposed)) * (inputs / colors) - group * seen(), 0, seen());
      const bool from = ordered() && transposed, to = ordered() && !transposed;  // the edge is a beginning, an end
      found.push_back({begin, cuts[i], group, from ? edge : 0, to ? edge : seen()});
    }
    return found;
  }
};

// How far the taps reach into an image of height x width: the rectangles of those that lie inside of one somewhere, without the
// ordered tap, and the zeros around it that they read.
struct Reach {
  std::int64_t dy, dx, height, width, left = 0, right = 0, top = 0, bottom = 0;
  std::vector<Rectangle> rectangles;

  Reach(const char* op, const Mask& m, const std::vector<std::int64_t>& dilation, std::int64_t height, std::int64_t width, bool with_ordered)
      : height(height), width(width) {
    FASTGEN_CHECK(dilation.size() == 2 && std::min(dilation[0], dilation[1]) >= 1, op, ": dilation must be two integers of at least 1");
    dy = dilation[0], dx = dilation[1];
    // Taps of one dimension [begin, end) that are inside of an image somewhere.
    const auto inside = [](std::int64_t origin, std::int64_t count, std::int64_t step, std::int64_t size) {
      const std::int64_t reach = std::max<std::int64_t>(size - 1, 0) / step;
      return std::pair(std::max<std::int64_t>(origin - reach, 0), std::min(origin + reach + 1, count));
    };
    const auto [first_row, end_row] = inside(m.y, m.height, dy, height);
    const auto [first_column, end_column] = inside(m.x, m.width, dx, width);
    const std::int64_t leave = m.ordered() && !with_ordered, begin = m.first + (leave && m.transposed), end = m.last - (leave && !m.transposed);
    for (std::int64_t at = begin; at < end;) {
      const std::int64_t row = at / m.width, column = at % m.width;
      const bool partial = column > 0 || at + m.width > end;
      const std::int64_t next = partial ? std::min(end, (row + 1) * m.width) : end - end % m.width;
      const std::int64_t rows = partial ? 1 : next / m.width - row, columns = partial ? next - at : m.width;
      at = next;
      const std::int64_t r = std::max(row, first_row), c = std::max(column, first_column);
      const Rectangle clipped{r, std::min(row + rows, end_row) - r, c, std::min(column + columns, end_column) - c};
      if (clipped.rows <= 0 || clipped.columns <= 0) continue;
      rectangles.push_back(clipped);
      top = std::max(top, (m.y - r) * dy), bottom = std::max(bottom, (r + clipped.rows - 1 - m.y) * dy);
      left = std::max(left, (m.x - c) * dx), right = std::max(right, (c + clipped.columns - 1 - m.x) * dx);
    }
  }

  std::int64_t rows() const { return top + height + bottom; }
  std::int64_t columns() const { return left + width + right; }
  // Of the pixel that a tap of the output (0, 0) reads, in an image with zeros around it.
  std::int64_t at(const Mask& m, std::int64_t row, std::int64_t column) const {
    return (top + (row - m.y) * dy) * columns() + left + (column - m.x) * dx;
  }
};

// A tensor [N, C, H, W] of any strides.
template <class T>
struct Pixels {
  const T* data;
  std::int64_t n, c, y, x;

  explicit Pixels(const Tensor& t) : data(static_cast<const T*>(t.data_ptr())), n(t.stride(0)), c(t.stride(1)), y(t.stride(2)), x(t.stride(3)) {}
  const T* at(std::int64_t sample, std::int64_t channel, std::int64_t row) const { return data + sample * n + channel * c + row * y; }
};

// to[i * to_row + j] = from[i * row + j * column] in fp32 for i < rows and j < columns; nothing else is written.
template <class T>
void copy_matrix(const T* from, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, float* to, std::int64_t to_row) {
  constexpr std::int64_t w = kWidth<float>;
  if (column == 1) {
    for (std::int64_t i = 0; i < rows; ++i)
      for_vectors<float>(columns, [&](std::int64_t j, auto at) { at.store(to + i * to_row + j, at.load(from + i * row + j)); });
    return;
  }
  std::int64_t i = 0;
  for (; row == 1 && i + w <= rows; i += w)
    for (std::int64_t j = 0; j < columns; j += w) {
      const int across = static_cast<int>(std::min(w, columns - j));
      VecF square[w];
      for (std::int64_t k = 0; k < w; ++k) square[k] = k < across ? load(from + i + (j + k) * column) : VecF(0.0f);
      transpose(square);
      for (std::int64_t k = 0; k < w; ++k) {
        float* const at = to + (i + k) * to_row + j;
        across == w ? store(at, square[k]) : store_part(at, square[k], across);
      }
    }
  for (; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) to[i * to_row + j] = widen(from[i * row + j * column]);
}

// Samples that are staged at a time: a MiB of fp32, or one sample.
inline std::int64_t samples_at_a_time(std::int64_t n, std::int64_t floats) {
  constexpr std::int64_t most = 1 << 18;
  return std::clamp<std::int64_t>(most / std::max<std::int64_t>(floats, 1), 1, std::max<std::int64_t>(n, 1));
}

// Samples [first, first + count): planes [sample][C][rows][columns]; the zeros around them if `fresh`.
template <class T>
void stage_planes(const Pixels<T>& x, std::int64_t channels, const Reach& reach, std::int64_t first, std::int64_t count, bool fresh,
                  float* staged) {
  const std::int64_t rows = reach.rows(), columns = reach.columns(), plane = rows * columns;
  parallel(count * rows, count * channels * plane, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t sample = item / rows, row = item % rows, y = row - reach.top;
      float* const to = staged + sample * channels * plane + row * columns;
      const bool inside = y >= 0 && y < reach.height;
      for (std::int64_t c = 0; fresh && c < channels; ++c) {
        float* const line = to + c * plane;
        std::fill(line, line + (inside ? reach.left : columns), 0.0f);
        if (inside) std::fill(line + reach.left + reach.width, line + columns, 0.0f);
      }
      if (inside) copy_matrix(x.at(first + sample, 0, y), x.c, x.x, channels, reach.width, to + reach.left, plane);
    }
  });
}

inline void check_image(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  FASTGEN_CHECK(t.scalar_type() != ScalarType::Double && t.dim() == 4, op, ": ", name, " must be [N, C, H, W] in float32, bfloat16 or float16");
}

}  // namespace fastgen::masked
