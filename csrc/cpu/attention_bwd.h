// What the two kinds of chunks of the backward share (attention_bwd.cpp, attention_bwd_tiles.h): how keys are cut, and the tensors of a call.
#pragma once

#include "attention.h"

namespace fastgen::attention {

// Of keys, whose gradients one thread sums while the rows go by.
struct Chunks {
  static constexpr std::int64_t kMost = 8;  // parts of dQ
  std::int64_t count, keys;

  // `items` pieces of work wanted, heads of keys times chunks; each of at least four blocks of `block` keys, where there are so many.
  static Chunks of(const Problem& p, std::int64_t items, std::int64_t block) {
    const std::int64_t heads = std::max<std::int64_t>(p.n * p.kv_heads, 1), least = 4 * block;
    const std::int64_t most = std::min(kMost, (p.keys + least - 1) / least);
    const std::int64_t wanted = std::clamp<std::int64_t>((items + heads - 1) / heads, 1, most);
    const std::int64_t keys = round_up((p.keys + wanted - 1) / wanted, block);
    return {(p.keys + keys - 1) / keys, keys};
  }
};

// The tensors of a call as they lie.
struct Tensors {
  View grad, query, key, value, output, d_query, d_key, d_value;
};

// logsumexp in powers of two and D of one panel of rows, +Inf and 0 for a row that saw no key and for what pads the panel: there weights
// and d_scores are 0. grads and outputs [Ev][lanes] as numbers.
template <class A>
void read_statistics(const A* logsumexp, std::int64_t rows, const A* grads, const A* outputs, std::int64_t width, std::int64_t lanes, A* to_logsumexp,
                     A* delta) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  for (std::int64_t r = 0; r < lanes; ++r) {
    const A value = r < rows ? logsumexp[r] : -infinity;
    to_logsumexp[r] = value == -infinity ? infinity : static_cast<A>(value * kLog2E);
    delta[r] = 0;
  }
  for (std::int64_t r = 0; r < rows; r += kWidth<A>) {
    Vec<A> sum(A(0));
    for (std::int64_t e = 0; e < width; ++e) sum = madd<A>(load(grads + e * lanes + r), load(outputs + e * lanes + r), sum);
    store(delta + r, sum);
  }
}

}  // namespace fastgen::attention
