// What forward and backward of attention share: the problem, its tensors as they lie, masks, and how a block of rows is read into the
// panels of _tiles.h and written back.
#pragma once

#include "_heads.h"

namespace fastgen::attention {

using namespace tiles;

// Whether pairs of bf16 are multiplied as such, where there is no matrix unit. An Intel takes four times as long for them as for a multiply-add of fp32.
#if defined(FASTGEN_EMULATED_PAIRS)  // for a test on any machine
inline constexpr bool kHasPairs = true;
inline bool pairs_are_fast() { return true; }
#elif defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
inline bool pairs_are_fast() { return !__builtin_cpu_is("intel"); }
#else
inline constexpr bool kHasPairs = false;
inline bool pairs_are_fast() { return false; }
#endif

// Only where the maximum of a row grows by more than this, in powers of two, are the sums so far scaled again.
inline constexpr int kSlack = 8;

struct Problem {
  std::int64_t n, heads, kv_heads, rows, keys, depth, width;  // depth: of queries and keys; width: of values
  bool causal;
  double scale;
  std::optional<View> mask;
  ScalarType mask_dtype = ScalarType::Bool;

  std::int64_t group() const { return heads / kv_heads; }  // query heads for one head of keys
  std::int64_t work() const { return n * heads * rows * keys * (depth + width) / 16; }
  // Keys that the rows before `row` may look at.
  std::int64_t visible(std::int64_t row) const { return causal ? std::min(row, keys) : keys; }
};

inline Problem make_problem(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
                            bool causal, double scale) {
  const ScalarType dtype = query.scalar_type();
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"query", query}, {"key", key}, {"value", value}}) {
    check_floating(op, name, t);
    FASTGEN_CHECK(t.dim() == 4, op, ": ", name, " must be [N, H, L, E]");
    FASTGEN_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype of query");
    FASTGEN_CHECK(t.size(0) == query.size(0), op, ": ", name, " must have the batch of query");
  }
  FASTGEN_CHECK(key.size(3) == query.size(3), op, ": key must have the head dimension of query");
  FASTGEN_CHECK(value.size(1) == key.size(1) && value.size(2) == key.size(2), op, ": value must have the heads and length of key");
  FASTGEN_CHECK(key.size(1) >= 1 ? query.size(1) % key.size(1) == 0 : query.size(1) == 0, op,
                ": the heads of key must divide those of query, got ", key.size(1), " and ", query.size(1));
  Problem p{query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3), causal, scale, {}};
  if (mask.has_value()) {
    p.mask_dtype = mask->scalar_type();
    if (p.mask_dtype != ScalarType::Bool) check_floating(op, "attn_mask", *mask);
    FASTGEN_CHECK((sizes_of(*mask) == std::vector{p.n, p.heads, p.rows, p.keys}), op, ": attn_mask must be [N, H, L, S]");
    p.mask = View(*mask);
  }
  return p;
}

// The lengths of [0, length) cut into equal blocks of at most `most`, each a multiple of `unit`.
inline std::int64_t block_length(std::int64_t length, std::int64_t most, std::int64_t unit) {
  const std::int64_t blocks = (length + most - 1) / most;
  return blocks == 0 ? unit : round_up((length + blocks - 1) / blocks, unit);
}

// What is added to the scores of keys [first, first + count) and rows [row, row + rows), as bias[key][row]: the mask, and -Inf where
// the row comes before the key.
template <class A, int lanes = kLanes<A>>
void read_bias(const Problem& p, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, std::int64_t first,
               std::int64_t count, A* bias) {
  constexpr A never = -std::numeric_limits<A>::infinity();
  if (!p.mask) {
    std::fill_n(bias, count * lanes, A(0));
  } else if (p.mask_dtype == ScalarType::Bool) {
    const bool* mask = p.mask->at<const bool>(n, h, row) + first * p.mask->column;
    for (std::int64_t k = 0; k < count; ++k)
      for (std::int64_t r = 0; r < lanes; ++r)
        bias[k * lanes + r] = r >= rows || mask[k * p.mask->column + r * p.mask->row] ? A(0) : never;
  } else {
    dispatch_dtype("attention", p.mask_dtype, [&]<class M>() {
      const M* mask = p.mask->at<const M>(n, h, row) + first * p.mask->column;
      read_panel<A>(mask, p.mask->column, p.mask->row, count, rows, bias, lanes);
    });
  }
  if (!p.causal) return;
  for (std::int64_t k = 0; k < count; ++k)
    for (std::int64_t r = 0; r < std::clamp<std::int64_t>(first + k - row, 0, rows); ++r) bias[k * lanes + r] = never;
}

}  // namespace fastgen::attention
