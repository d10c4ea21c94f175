// How the products of _product.h are computed.
//
// A block of registers holds kRows rows by kPanels panels of outputs; a step over one channel loads the weights' vectors, spreads a
// value of each row, and does rows x vectors multiply-adds. Panels of weights pass through the first-level cache once a block of
// channels, while the values of all rows stay in the second; the rows are shared out evenly over blocks of at most kRows, so that
// none is computed in vain. Sums run over the channels of a block from zero, which keeps their errors small, and block after block in
// order: the same bits whoever computes them. Short lines are taken several to a block. With AVX-512 a few rows use up weights faster than
// they come by themselves: the first blocks of rows ask for those of the next panels (16 rows of 640 channels, Xeon with 2 MB of
// second-level cache: 1.28 times as fast; 64 rows and more: the same).
#include "_product.h"

#include <algorithm>
#include <array>

namespace fastgen {
namespace {

// Sixteen vector registers hold 6 x 2 sums of AVX2, thirty-two 14 x 2 of AVX-512; SSE2 has four vectors a panel.
#if defined(__AVX512F__)
constexpr int kRows = 14, kPanels = 2;
constexpr bool kAsk = true;  // for the weights of the next panels
#elif defined(__AVX2__)
constexpr int kRows = 6, kPanels = 1;
constexpr bool kAsk = false;
#else
constexpr int kRows = 2, kPanels = 1;
constexpr bool kAsk = false;
#endif
constexpr int kVectors = static_cast<int>(kPanel) / kWidth<float>;  // of a panel
constexpr std::int64_t kChannels = 256;  // of a block: 16 KB of weights beside the values of 6 rows, 6 KB

// What a block of rows asks for: from `from` on, `step` further at each channel.
struct Ahead {
  const float* from;
  std::int64_t step;
};

// `rows` rows times `panels` panels over `channels` of `lines` of p. Adds to what is there unless `fresh`.
template <int rows, int panels>
void block(const Product& p, const float* values, const float* weights, float* products, std::int64_t lines, std::int64_t channels,
           bool fresh, [[maybe_unused]] Ahead ahead) {
  const std::int64_t value_stride = p.value_stride, panel_stride = p.panel_stride, product_stride = p.product_stride;
  constexpr int vectors = panels * kVectors;
  VecF sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[r][v] = VecF(0.0f);
  for (std::int64_t l = 0; l < lines; ++l, values += p.value_line, weights += p.weight_line)
    for (std::int64_t c = 0; c < channels; ++c) {
      if constexpr (kAsk) prefetch(ahead.from + c * ahead.step);
      VecF w[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        w[v] = load(weights + v / kVectors * panel_stride + c * kPanel + v % kVectors * kWidth<float>);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const VecF x(values[r * value_stride + c]);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sum[r][v] = madd<float>(x, w[v], sum[r][v]);
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      float* const at = products + r * product_stride + v * kWidth<float>;
      store(at, fresh ? sum[r][v] : load(at) + sum[r][v]);
    }
}

using Block = void (*)(const Product&, const float*, const float*, float*, std::int64_t, std::int64_t, bool, Ahead);

template <int panels, int... rows>
constexpr auto blocks_of(std::integer_sequence<int, rows...>) {
  return std::array<Block, sizeof...(rows)>{block<rows + 1, panels>...};
}
// The block of r + 1 rows.
template <int panels>
constexpr auto kBlocks = blocks_of<panels>(std::make_integer_sequence<int, kRows>{});

}  // namespace

void multiply(const Product& p, std::int64_t first, std::int64_t last) {
  const std::int64_t parts = ceil_div(p.channels, kChannels), groups = ceil_div(p.rows, kRows);
  const std::int64_t most = std::max<std::int64_t>(kChannels / std::max<std::int64_t>(p.channels, 1), 1), sets = ceil_div(p.lines, most);
  for (std::int64_t i = 0; i < sets * parts; ++i) {
    const std::int64_t set = i / parts, part = i % parts, line = set * p.lines / sets, lines = (set + 1) * p.lines / sets - line;
    const std::int64_t begin = part * p.channels / parts, end = (part + 1) * p.channels / parts;
    for (std::int64_t panel = first; panel < last; panel += kPanels) {
      const bool whole = panel + kPanels <= last;
      const float* const weights = p.weights + panel * p.panel_stride + line * p.weight_line + begin * kPanel;
      // Each of the blocks of rows asks for as much of the next panels as the others.
      const bool other = p.next != nullptr && panel + kPanels >= last;
      const float* const after = other ? p.next + line * p.weight_line + begin * kPanel : weights + kPanels * p.panel_stride;
      const std::int64_t blocks = std::max<std::int64_t>(groups / kPanels, 1), step = ceil_div(kPanel, blocks);
      for (std::int64_t g = 0; g < groups; ++g) {
        const Ahead ahead{after + g / blocks % kPanels * p.panel_stride + g % blocks * step * (end - begin), step};
        const std::int64_t row = g * p.rows / groups, rows = (g + 1) * p.rows / groups - row;
        const Block run = whole ? kBlocks<kPanels>[rows - 1] : kBlocks<1>[rows - 1];
        run(p, p.values + row * p.value_stride + line * p.value_line + begin, weights, p.products + row * p.product_stride + panel * kPanel,
            lines, end - begin, i == 0 && !p.add, ahead);
      }
    }
  }
}

}  // namespace fastgen
