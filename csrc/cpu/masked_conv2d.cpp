// masked_conv2d with packed weights: a direct convolution by the taps of the mask alone; and, with the kernel turned round, the gradient of its
// input.
//
// An image is staged in fp32, channels innermost, a group at a time, zeros around it: the pixels of a row are then a matrix whose rows
// overlap, and a rectangle of taps is one product of it (_product.h), whose lines are the rows of the kernel; with dilated columns
// one product a column of taps. What is ordered by color is a product of the channels that a color sees. A thread owns a run of
// pixels and up to kShare panels of outputs, whose weights stay in its second-level cache; the sums of a pixel are taken in one
// order whoever takes them. Few channels and few outputs go another way (masked_conv2d_planes.h).
//
// Packed weights are [panels, taps, C / groups, kPanel], taps in raster order; a panel is of one run of outputs, of one group and color.
// Winograd's algorithm would be faster for 3x3, and lets a pixel that may not be seen into the rounding of one that sees it not.

#include "masked_conv2d_planes.h"

namespace fastgen::masked {
namespace {

constexpr std::int64_t kShare = 4;     // panels at a time: 64 outputs of 5 taps of 256 channels are 320 KB of weights
constexpr std::int64_t kPixels = 128;  // of a block: 32 KB of products
constexpr std::int64_t kWidthF = kWidth<float>;

std::int64_t panels_of(const std::vector<Run>& runs) {
  std::int64_t panels = 0;
  for (const Run& run : runs) panels += ceil_div(run.last - run.first, kPanel);
  return panels;
}

// ---- weights -------------------------------------------------------------------------------------------------------------------

template <class T>
void pack(const Tensor& weight, const Mask& m, float* packed) {
  const T* const w = static_cast<const T*>(weight.data_ptr());
  const std::int64_t of_output = weight.stride(m.transposed ? 1 : 0), of_input = weight.stride(m.transposed ? 0 : 1);
  const std::int64_t taps = m.taps(), seen = m.seen(), of_group = m.outputs / m.groups, last = m.height * m.width - 1;
  std::vector<std::int64_t> at(taps);  // where a tap stands in the weight
  for (std::int64_t t = 0; t < taps; ++t) {
    const std::int64_t tap = m.transposed ? last - (m.first + t) : m.first + t;
    at[t] = tap / m.width * weight.stride(2) + tap % m.width * weight.stride(3);
  }
  for (const Run& run : m.runs()) {
    const std::int64_t panels = ceil_div(run.last - run.first, kPanel);
    // Transposed, the outputs are the second dimension of the weight, counted within the group, and the inputs the first.
    const T* const from = w + (run.first - (m.transposed ? run.group * of_group : 0)) * of_output + (m.transposed ? run.group * seen * of_input : 0);
    parallel(panels * seen, panels * seen * taps * kPanel, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t panel = item / seen, c = item % seen;
        float* to = packed + (panel * taps * seen + c) * kPanel;
        const bool sees_all = !m.ordered() || (run.low <= c && c < run.high);
        const std::int64_t outputs = std::min(kPanel, run.last - run.first - panel * kPanel);
        const T* const first = from + panel * kPanel * of_output + c * of_input;
        for (std::int64_t t = 0; t < taps; ++t, to += seen * kPanel) {
          std::fill(to, to + kPanel, 0.0f);
          if (!sees_all && t == m.ordered_tap()) continue;
          for (std::int64_t k = 0; k < outputs; ++k) to[k] = static_cast<float>(widen(first[k * of_output + at[t]]));
        }
      }
    });
    packed += panels * taps * seen * kPanel;
  }
}

Tensor masked_conv2d_pack(const Tensor& weight, std::int64_t mask_type, std::int64_t groups, std::int64_t color_channels, bool transposed) {
  const char* const op = "masked_conv2d_pack";
  check_floating(op, "weight", weight);
  FASTGEN_CHECK(weight.dim() == 4 && weight.numel() > 0, op, ": weight must be [K, C / groups, kh, kw] and not empty");
  FASTGEN_CHECK(groups >= 1 && groups <= weight.size(0), op, ": groups must divide the channels, got groups=", groups);
  const Mask straight(op, {weight.size(2), weight.size(3)}, mask_type, groups, color_channels, weight.size(0), weight.size(1) * groups);
  const Mask m = transposed ? straight.turned() : straight;
  Tensor packed = empty_contiguous({panels_of(m.runs()), m.taps(), m.seen(), kPanel}, ScalarType::Float);
  dispatch_dtype(op, weight.scalar_type(), [&]<class T>() { pack<T>(weight, m, static_cast<float*>(packed.mutable_data_ptr())); });
  return packed;
}

// ---- products ------------------------------------------------------------------------------------------------------------------

// Samples [first, first + count), as [sample][group][rows][columns][C / groups]. The zeros around them are written if `fresh`.
template <class T>
void stage(const Pixels<T>& x, const Mask& m, const Reach& reach, std::int64_t first, std::int64_t count, bool fresh, float* staged) {
  const std::int64_t rows = reach.rows(), seen = m.seen(), length = reach.columns() * seen;
  parallel(count * m.groups * rows, count * m.groups * rows * length, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      float* const to = staged + item * length;
      const std::int64_t plane = item / rows, y = item % rows - reach.top;
      if (y < 0 || y >= reach.height) {
        if (fresh) std::fill(to, to + length, 0.0f);
        continue;
      }
      if (fresh) std::fill(to, to + reach.left * seen, 0.0f), std::fill(to + (reach.left + reach.width) * seen, to + length, 0.0f);
      const T* const from = x.at(first + plane / m.groups, plane % m.groups * seen, y);
      copy_matrix(from, x.x, x.c, reach.width, seen, to + reach.left * seen, seen);
    }
  });
}

// Up to kShare panels of a run.
struct Share {
  const Run* run;
  std::int64_t first, outputs, panel, panels;  // the first output and panel of all
};

std::vector<Share> shares_of(const std::vector<Run>& runs) {
  std::vector<Share> shares;
  std::int64_t panel = 0;
  for (const Run& run : runs) {
    const std::int64_t panels = ceil_div(run.last - run.first, kPanel);
    for (std::int64_t p = 0; p < panels; p += kShare) {
      const std::int64_t first = run.first + p * kPanel;
      shares.push_back({&run, first, std::min(kShare * kPanel, run.last - first), panel + p, std::min(kShare, panels - p)});
    }
    panel += panels;
  }
  return shares;
}

// Pixels [at, at + count) of a sample, whole rows of them or part of one.
struct Block {
  std::int64_t row, rows, column, columns;
};

// [rows * columns][panels * kPanel] sums of a block of pixels of one staged plane.
void multiply_taps(const Mask& m, const Reach& reach, const Share& share, const Block& block, const float* plane, const float* packed,
                   float* sums) {
  const std::int64_t seen = m.seen(), line = reach.columns() * seen, of_panel = m.taps() * seen * kPanel, stride = share.panels * kPanel;
  const float* const weights = packed + share.panel * of_panel;
  bool add = false;
  const auto product = [&](const float* values, std::int64_t tap, std::int64_t low, std::int64_t channels, std::int64_t lines) {
    for (std::int64_t y = 0; y < block.rows; ++y)
      multiply({values + low + ((block.row + y) * reach.columns() + block.column) * seen, weights + (tap * seen + low) * kPanel,
                sums + y * block.columns * stride, block.columns, channels, seen, stride, of_panel, lines, reach.dy * line,
                m.width * seen * kPanel, add},
               0, share.panels);
    add = true;
  };
  for (const Rectangle& r : reach.rectangles) {
    const std::int64_t together = reach.dx == 1 ? r.columns : 1;  // columns whose pixels are neighbours
    for (std::int64_t c = r.column; c < r.column + r.columns; c += together)
      product(plane + reach.at(m, r.row, c) * seen, r.row * m.width + c - m.first, 0, together * seen, r.rows);
  }
  if (m.ordered() && share.run->low < share.run->high)
    product(plane + reach.at(m, m.y, m.x) * seen, m.ordered_tap(), share.run->low, share.run->high - share.run->low, 1);
  if (!add) std::fill(sums, sums + block.rows * block.columns * stride, 0.0f);
}

// sums + bias of `count` pixels from `at` on, to channels [share.first, + share.outputs) of one sample of the output.
template <class T>
void finish(const Share& share, const float* sums, const float* bias, std::int64_t at, std::int64_t count, bool channels_last,
            std::int64_t outputs, std::int64_t pixels, T* out) {
  const std::int64_t stride = share.panels * kPanel;
  if (channels_last) {
    for (std::int64_t p = 0; p < count; ++p)
      for_vectors<float>(share.outputs, [&](std::int64_t c, auto part) {
        part.store(out + (at + p) * outputs + share.first + c, load(sums + p * stride + c) + load(bias + c));
      });
    return;
  }
  for (std::int64_t c = 0; c < share.outputs; c += kWidthF)
    for_vectors<float>(count, [&](std::int64_t p, auto part) {
      VecF square[kWidthF];
      for (std::int64_t k = 0; k < kWidthF; ++k) square[k] = load(sums + std::min(p + k, count - 1) * stride + c);
      transpose(square);
      for (std::int64_t k = 0; k < std::min(kWidthF, share.outputs - c); ++k)
        part.store(out + (share.first + c + k) * pixels + at + p, square[k] + VecF(bias[c + k]));
    });
}

template <class T>
void convolve(const Tensor& input, const Mask& m, const Reach& reach, const float* packed, const Parameter& bias, Tensor& output) {
  const Pixels<T> x(input);
  T* const out = static_cast<T*>(output.mutable_data_ptr());
  const bool channels_last = is_channels_last(input);
  const std::int64_t n = input.size(0), pixels = reach.height * reach.width, plane = reach.rows() * reach.columns() * m.seen();
  const std::vector<Run> runs = m.runs();
  const std::vector<Share> shares = shares_of(runs);
  // Blocks of whole rows, or of a part of one.
  const std::int64_t parts = ceil_div(reach.width, 2 * kPixels), rows = parts > 1 ? 1 : std::clamp<std::int64_t>(kPixels / reach.width, 1, reach.height);
  const std::int64_t bands = ceil_div(reach.height, rows), blocks = bands * parts;
  const std::int64_t chunk = samples_at_a_time(n, m.groups * plane);
  const Scratch<float> memory(chunk * m.groups * plane);
  float* const staged = memory.get();
  for (std::int64_t first = 0; first < n; first += chunk) {
    const std::int64_t count = std::min(chunk, n - first), items = count * blocks;
    stage(x, m, reach, first, count, first == 0, staged);
    const std::int64_t work = count * pixels * m.outputs * (m.taps() * m.seen() + 1);
    parallel(items * static_cast<std::int64_t>(shares.size()), work, [&](std::int64_t begin, std::int64_t end) {
      const Scratch<float> sums(std::max(rows * reach.width, 2 * kPixels) * kShare * kPanel);
      alignas(64) float biases[kShare * kPanel];
      for (std::int64_t item = begin; item < end; ++item) {
        const Share& share = shares[item / items];
        const std::int64_t sample = item % items / blocks, block = item % blocks, band = block / parts, part = block % parts;
        const std::int64_t row = band * reach.height / bands, column = part * reach.width / parts;
        const Block of{row, (band + 1) * reach.height / bands - row, column, (part + 1) * reach.width / parts - column};
        multiply_taps(m, reach, share, of, staged + (sample * m.groups + share.run->group) * plane, packed, sums.get());
        std::fill(biases, biases + kShare * kPanel, 0.0f);
        bias.read(0, share.first, share.outputs, 0.0f, biases);
        finish(share, sums.get(), biases, row * reach.width + column, of.rows * of.columns, channels_last, m.outputs, pixels,
               out + (first + sample) * m.outputs * pixels);
      }
    });
  }
}

Tensor masked_conv2d_packed(const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias,
                            std::vector<std::int64_t> kernel, std::int64_t mask_type, std::vector<std::int64_t> dilation, std::int64_t groups,
                            std::int64_t color_channels, bool transposed) {
  const char* const op = "masked_conv2d_packed";
  check_image(op, "input", input);
  const std::int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  const Mask straight(op, kernel, mask_type, groups, color_channels, transposed ? c : out_channels, transposed ? out_channels : c);
  const Mask m = transposed ? straight.turned() : straight;
  FASTGEN_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 4 && packed.is_contiguous() &&
                    (sizes_of(packed) == std::vector{panels_of(m.runs()), m.taps(), m.seen(), kPanel}),
                op, ": packed must be what masked_conv2d_pack returns, for ", c, " channels and out_channels=", out_channels);
  const Parameter parameter(op, "bias", bias, false, 1, out_channels);
  const Reach reach(op, m, dilation, h, w, false);
  const std::vector<std::int64_t> sizes = {n, out_channels, h, w};
  Tensor output = empty_strided(sizes, dense_strides(sizes, is_channels_last(input)), input.scalar_type());
  if (output.numel() == 0) return output;
  dispatch_dtype(op, input.scalar_type(), [&]<class T>() {
    if constexpr (std::is_same_v<opmath_t<T>, float>) {
      const auto run = by_planes(m, w, is_channels_last(input)) ? convolve_planes<T> : convolve<T>;
      run(input, m, reach, static_cast<const float*>(packed.data_ptr()), parameter, output);
    }
  });
  return output;
}

}  // namespace
}  // namespace fastgen::masked

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("masked_conv2d_pack", TORCH_BOX(&fastgen::masked::masked_conv2d_pack));
  m.impl("masked_conv2d_packed", TORCH_BOX(&fastgen::masked::masked_conv2d_packed));
}
