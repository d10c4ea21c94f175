// What forward and backward of linear attention share: the problem, how positions are cut into chunks and blocks, and the panels of
// one block, over the tiles of _tiles.h.
//
// All products have positions in their lanes or in their sums: queries, keys and their weights lie as [D][positions], values as
// [positions][E] where they are summed over, whatever layout they have in memory.
#pragma once

#include "_heads.h"

namespace fastgen::linear_attention {

using namespace tiles;

inline constexpr std::int64_t kBlock = 192;        // positions whose panels of 32 channels, 24 KB each, are worked on: whole lanes of any kind
inline constexpr std::int64_t kChunk = 3 * kBlock;  // positions that a thread takes: of each a context is left, 4 KB

struct Problem {
  std::int64_t n, heads, depth, width, length, keys, memories;  // depth: of queries and keys; width: of values
  double scale;

  std::int64_t items() const { return n * heads; }
  std::int64_t work() const { return n * heads * (length + keys) * depth * std::max<std::int64_t>(width, 1) / 16; }
};

inline std::int64_t chunks_of(std::int64_t positions) { return (positions + kChunk - 1) / kChunk; }

// [H, D, M], the same for all samples.
inline View view_of_memory(const Tensor& t) {
  View view;
  view.data = const_cast<void*>(t.data_ptr());
  view.head = t.stride(0), view.row = t.stride(1), view.column = t.stride(2);
  return view;
}

inline Problem make_problem(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& memory_key,
                            const OptionalTensor& memory_value, double scale) {
  const ScalarType dtype = query.scalar_type();
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"query", query}, {"key", key}, {"value", value}}) {
    check_floating(op, name, t);
    FASTGEN_CHECK(t.dim() == 4, op, ": ", name, " must be [N, H, D, L]");
    FASTGEN_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype of query");
    FASTGEN_CHECK(t.size(0) == query.size(0) && t.size(1) == query.size(1), op, ": ", name, " must have the batch and the heads of query");
  }
  FASTGEN_CHECK(key.size(2) == query.size(2), op, ": key must have the features of query");
  FASTGEN_CHECK(value.size(3) == key.size(3), op, ": value must have the positions of key");
  FASTGEN_CHECK(memory_key.has_value() == memory_value.has_value(), op, ": memory_key and memory_value must be given together");
  Problem p{query.size(0), query.size(1), query.size(2), value.size(2), query.size(3), key.size(3), 0, scale};
  if (memory_key.has_value()) {
    FASTGEN_CHECK(memory_key->dim() == 3 && memory_key->size(0) == p.heads && memory_key->size(1) == p.depth &&
                      memory_key->scalar_type() == dtype,
                  op, ": memory_key must be [H, D, M] in the dtype of query");
    p.memories = memory_key->size(2);
    FASTGEN_CHECK((sizes_of(*memory_value) == std::vector{p.heads, p.width, p.memories}) && memory_value->scalar_type() == dtype, op,
                  ": memory_value must be [H, E, M] in the dtype of query");
  }
  return p;
}

// to[row][lane] = sum over r < depth of a[row, r] b[r][lane] for row < rows, lane < lanes: a is readable, and `to` written, up to the
// next multiples of kTall rows and of whole vectors. Added to what is there, times `factor[row]`, where one is given.
template <class A>
void product(const A* a, std::int64_t a_row, std::int64_t a_step, const A* b, std::int64_t b_row, std::int64_t depth, std::int64_t rows,
             std::int64_t lanes, A* to, std::int64_t to_row, const A* factor = nullptr) {
  const std::int64_t vectors = (lanes + kWidth<A> - 1) / kWidth<A>, groups = (vectors + kWide - 1) / kWide;
  for (std::int64_t g = 0; g < groups; ++g) {  // of as many vectors each: four are two and two, not three and one
    const std::int64_t j = g * vectors / groups * kWidth<A>, end = (g + 1) * vectors / groups * kWidth<A>;
    with_width<A>(end - j, [&](auto width) {
      constexpr int wide = width;
      for (std::int64_t row = 0; row < rows; row += kTall) {
        Tile<A, wide> sum;
        clear<A, wide>(sum);
        multiply<Singles<A>, A, wide>(a + row * a_row, a_row, a_step, b + j, b_row, depth, sum);
        for (int i = 0; i < kTall; ++i)
          for (int v = 0; v < wide; ++v) {
            A* const at = to + (row + i) * to_row + j + v * kWidth<A>;
            store(at, factor ? madd<A>(load(at), Vec<A>(factor[row + i]), sum[i][v]) : sum[i][v]);
          }
      }
    });
  }
}

// exp(x - high) in place over `count` positions of a row, up to whole lanes, which must be there; returns their sum.
template <class A>
A exponentials(A* x, std::int64_t count, A high) {
  constexpr int wide = kWide;
  const Vec<A> shift(high), scale(static_cast<A>(kLog2E));
  Vec<A> sum(A(0));
  for (std::int64_t j = 0; j < count; j += kLanes<A>) {
    Vec<A> y[wide];
    for (int v = 0; v < wide; ++v) y[v] = (load(x + j + v * kWidth<A>) - shift) * scale;
    exp2(y);
    for (int v = 0; v < wide; ++v) store(x + j + v * kWidth<A>, y[v]), sum += y[v];
  }
  return sum_lanes<A>(sum);
}

// The softmax over features of a block of queries [depth][kBlock], in place and times `scale`.
template <class A>
void softmax_of_features(A* x, std::int64_t depth, std::int64_t count, A scale) {
  constexpr int wide = kWide;
  const Vec<A> base(static_cast<A>(kLog2E));
  for (std::int64_t j = 0; j < count; j += kLanes<A>) {
    Vec<A> high[wide], sum[wide], y[wide];
    for (int v = 0; v < wide; ++v) high[v] = Vec<A>(-std::numeric_limits<A>::infinity()), sum[v] = Vec<A>(A(0));
    for (std::int64_t d = 0; d < depth; ++d)
      for (int v = 0; v < wide; ++v) high[v] = stdx::max(high[v], load(x + d * kBlock + j + v * kWidth<A>));
    for (std::int64_t d = 0; d < depth; ++d) {
      A* const at = x + d * kBlock + j;
      for (int v = 0; v < wide; ++v) y[v] = (load(at + v * kWidth<A>) - high[v]) * base;
      exp2(y);
      for (int v = 0; v < wide; ++v) store(at + v * kWidth<A>, y[v]), sum[v] += y[v];
    }
    for (int v = 0; v < wide; ++v) sum[v] = scale / sum[v];
    for (std::int64_t d = 0; d < depth; ++d)
      for (int v = 0; v < wide; ++v) {
        A* const at = x + d * kBlock + j + v * kWidth<A>;
        store(at, load(at) * sum[v]);
      }
  }
}

// Channels of `count` positions from `first` on, as [channels][kBlock].
template <class A, class T>
void read_channels(const View& view, std::int64_t n, std::int64_t h, std::int64_t first, std::int64_t count, std::int64_t channels, A* to) {
  read_panel<A>(view.at<const T>(n, h, 0) + first * view.column, view.row, view.column, channels, count, to, kBlock);
}

// The same as [positions][row].
template <class A, class T>
void read_positions(const View& view, std::int64_t n, std::int64_t h, std::int64_t first, std::int64_t count, std::int64_t channels, A* to,
                    std::int64_t row) {
  read_panel<A>(view.at<const T>(n, h, 0) + first * view.column, view.column, view.row, count, channels, to, row);
}

template <class A, class T>
void write_channels(const A* from, const View& view, std::int64_t n, std::int64_t h, std::int64_t first, std::int64_t count,
                    std::int64_t channels) {
  write_panel<A>(from, kBlock, channels, count, view.at<T>(n, h, 0) + first * view.column, view.row, view.column);
}

}  // namespace fastgen::linear_attention
