// The gradient of the weight of masked_conv2d: at each live tap the product of the image, as far as the tap reads it, with the gradient of the output,
// a sum over all pixels.
//
// Staged in fp32 are the image, a plane a channel with zeros around it, and the gradient in panels [pixels][kPanel] of outputs. A
// product (_product.h) sums over the rows of an image as lines: its rows are the channels of a tap or, where a group has few, the
// neighbouring taps of a row, a pixel apart. A thread owns taps, channels and panels, and takes all samples in order: no sum
// depends on who takes it.
#include "masked_conv2d_planes.h"

namespace fastgen::masked {
namespace {

constexpr std::int64_t kShare = 4;      // panels at a time
constexpr std::int64_t kChannels = 48;  // rows at a time, some blocks of registers: 250 pixels of them are 48 KB
constexpr std::int64_t kFew = 6;        // channels: fewer leave a block of registers empty

// Samples [first, first + count): panels [sample][group][panel][pixels][kPanel]; zeros beyond the last output of a group if `fresh`.
template <class T>
void stage_panels(const Pixels<T>& grad, std::int64_t groups, std::int64_t of_group, const Reach& reach, std::int64_t first, std::int64_t count,
                  bool fresh, float* staged) {
  const std::int64_t panels = ceil_div(of_group, kPanel), pixels = reach.height * reach.width;
  parallel(count * groups * panels, count * groups * panels * pixels * kPanel, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t panel = item % panels, group = item / panels % groups, sample = item / panels / groups;
      const std::int64_t channels = std::min(kPanel, of_group - panel * kPanel);
      float* const to = staged + item * pixels * kPanel;
      if (fresh && channels < kPanel) std::fill(to, to + pixels * kPanel, 0.0f);
      for (std::int64_t y = 0; y < reach.height; ++y)
        copy_matrix(grad.at(first + sample, group * of_group + panel * kPanel, y), grad.x, grad.c, reach.width, channels,
                    to + y * reach.width * kPanel, kPanel);
    }
  });
}

// Rows of one product: `rows` channels from `channel` on of one tap, or, of one channel, `rows` taps from there on.
struct Rows {
  std::int64_t row, column, channel, rows;
};

std::vector<Rows> rows_of(const Reach& reach, std::int64_t seen) {
  std::vector<Rows> found;
  const std::int64_t parts = ceil_div(seen, kChannels);
  for (const Rectangle& r : reach.rectangles)
    for (std::int64_t row = r.row; row < r.row + r.rows; ++row) {
      for (std::int64_t c = 0; seen < kFew && c < seen; ++c) found.push_back({row, r.column, c, r.columns});
      for (std::int64_t column = r.column; seen >= kFew && column < r.column + r.columns; ++column)
        for (std::int64_t p = 0; p < parts; ++p) found.push_back({row, column, p * seen / parts, (p + 1) * seen / parts - p * seen / parts});
    }
  return found;
}

// [groups][taps][C / groups][panels * kPanel], summed over all samples.
template <class T>
void accumulate(const Tensor& grad_output, const Tensor& input, const Mask& m, const Reach& reach, float* sums) {
  const Pixels<T> grad(grad_output), x(input);
  const std::int64_t n = input.size(0), pixels = reach.height * reach.width, plane = reach.rows() * reach.columns(), seen = m.seen();
  const std::int64_t of_group = m.outputs / m.groups, panels = ceil_div(of_group, kPanel), stride = panels * kPanel;
  const std::int64_t image = m.inputs * plane, gradient = m.groups * panels * pixels * kPanel, chunk = samples_at_a_time(n, image + gradient);
  const Scratch<float> memory(chunk * (image + gradient));
  float* const images = memory.get();
  float* const gradients = images + chunk * image;
  const std::vector<Rows> all = rows_of(reach, seen);
  const std::int64_t pieces = static_cast<std::int64_t>(all.size()), shares = ceil_div(panels, kShare), tap = seen * stride;
  for (std::int64_t first = 0; first < n; first += chunk) {
    const std::int64_t count = std::min(chunk, n - first);
    stage_planes(x, m.inputs, reach, first, count, first == 0, images);
    stage_panels(grad, m.groups, of_group, reach, first, count, first == 0, gradients);
    parallel(m.groups * shares * pieces, count * pixels * m.outputs * seen * m.taps(), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const Rows& r = all[item % pieces];
        const std::int64_t share = item / pieces % shares, group = item / pieces / shares, panel = share * kShare;
        float* const to = sums + (group * m.taps() + r.row * m.width + r.column - m.first) * tap + r.channel * stride + panel * kPanel;
        const std::int64_t value_stride = seen < kFew ? reach.dx : plane, product_stride = seen < kFew ? tap : stride;
        for (std::int64_t s = 0; s < count; ++s)
          multiply({images + s * image + (group * seen + r.channel) * plane + reach.at(m, r.row, r.column),
                    gradients + ((s * m.groups + group) * panels + panel) * pixels * kPanel, to, r.rows, reach.width, value_stride, product_stride,
                    pixels * kPanel, reach.height, reach.columns(), reach.width * kPanel, first + s > 0},
                   0, std::min(kShare, panels - panel));
      }
    });
  }
}

// The sums as the weight lies, zero where it is masked.
void unpack(const Mask& m, const float* sums, float* out) {
  const std::int64_t seen = m.seen(), of_group = m.outputs / m.groups, stride = ceil_div(of_group, kPanel) * kPanel, area = m.height * m.width;
  for (const Run& run : m.runs())
    parallel(run.last - run.first, (run.last - run.first) * seen * area, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t o = run.first + begin; o < run.first + end; ++o)
        for (std::int64_t c = 0; c < seen; ++c) {
          float* const to = out + (o * seen + c) * area;
          std::fill(to, to + area, 0.0f);
          const bool sees_all = !m.ordered() || (run.low <= c && c < run.high);
          for (std::int64_t t = 0; t < m.taps(); ++t)
            if (sees_all || t != m.ordered_tap())
              to[m.first + t] = sums[((run.group * m.taps() + t) * seen + c) * stride + o - run.group * of_group];
        }
    });
}

Tensor masked_conv2d_weight_bwd(const Tensor& grad_output, const Tensor& input, std::vector<std::int64_t> kernel, std::int64_t mask_type,
                                std::vector<std::int64_t> dilation, std::int64_t groups, std::int64_t color_channels) {
  const char* const op = "masked_conv2d_weight_bwd";
  check_image(op, "input", input);
  check_image(op, "grad_output", grad_output);
  const std::int64_t h = input.size(2), w = input.size(3);
  FASTGEN_CHECK(grad_output.scalar_type() == input.scalar_type() && grad_output.size(0) == input.size(0) && grad_output.size(2) == h &&
                    grad_output.size(3) == w,
                op, ": grad_output must be [N, K, H, W] in the dtype and of the size of input");
  const Mask m(op, kernel, mask_type, groups, color_channels, grad_output.size(1), input.size(1));
  const Reach reach(op, m, dilation, h, w, true);
  Tensor output = empty_contiguous({m.outputs, m.seen(), m.height, m.width}, ScalarType::Float);
  const std::int64_t size = groups * m.taps() * m.seen() * ceil_div(m.outputs / groups, kPanel) * kPanel;
  const Scratch<float> memory(size);
  float* const sums = memory.get();
  std::fill(sums, sums + size, 0.0f);  // of taps that lie outside of every image
  if (input.numel() > 0)
    dispatch_dtype(op, input.scalar_type(), [&]<class T>() {
      if constexpr (std::is_same_v<opmath_t<T>, float>) {
        if (weight_by_planes(m, w, grad_output.stride(3) == 1)) accumulate_planes<T>(grad_output, input, m, reach, ceil_div(m.outputs / groups, kPanel) * kPanel, sums);
        else accumulate<T>(grad_output, input, m, reach, sums);
      }
    });
  unpack(m, sums, static_cast<float*>(output.mutable_data_ptr()));
  return output;
}

}  // namespace
}  // namespace fastgen::masked

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("masked_conv2d_weight_bwd", TORCH_BOX(&fastgen::masked::masked_conv2d_weight_bwd)); }
