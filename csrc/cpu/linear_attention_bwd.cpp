// linear_attention, backward. With S and P the softmax of queries and keys, C the context and dO the gradient of the output
//
//   dS = scale C dO,  dQ = S (dS - sum_d S dS),  dC = scale S dO^T;   dV = dC^T P,  dK = P (dC V - sum_e C dC)
//
// Queries and gradients are read in one pass, which leaves dC in parts, one a chunk of positions that a thread owns, and they are
// added in order; keys and values in a second one, in which positions know nothing of one another. P comes from the maxima and
// sums of the keys. Gradients of memories are summed over the samples by the thread that owns the head.
#include "linear_attention.h"

namespace fastgen::linear_attention {
namespace {

template <class A>
struct Sizes {
  std::int64_t depth_rows, width_rows, width_row;  // D and E in whole tiles; E in whole tiles and vectors

  explicit Sizes(const Problem& p)
      : depth_rows(round_up(p.depth, kTall)), width_rows(round_up(p.width, kTall)), width_row(round_up(p.width, kUnit<A>)) {}
  std::int64_t context() const { return depth_rows * width_row; }
};

// dQ, and dC of all heads [N H][D][width_row].
template <class A, class T>
void queries_pass(const Problem& p, const View& query, const View& grad, const A* context, const View& d_query, A* d_context) {
  const Sizes<A> sizes(p);
  const std::int64_t chunks = chunks_of(p.length), size = sizes.context();
  const Scratch<A> parts(p.items() * chunks * size);
  std::vector<A> ones(sizes.depth_rows, A(1));
  parallel(p.items() * chunks, p.work(), [&](std::int64_t begin, std::int64_t end) {
    Arena arena;
    A *const s = arena.take<A>(sizes.depth_rows * kBlock), *const ds = arena.take<A>(sizes.depth_rows * kBlock);
    A *const g = arena.take<A>(sizes.width_rows * kBlock), *const g_positions = arena.take<A>(kBlock * sizes.width_row);
    A* const c = arena.take<A>(size);
    const A scale = static_cast<A>(p.scale);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t head = item / chunks, n = head / p.heads, h = head % p.heads;
      const std::int64_t last = std::min(p.length, (item % chunks + 1) * kChunk);
      A* const part = parts.get() + item * size;
      std::fill_n(part, size, A(0));
      read_panel<A>(context + head * p.depth * p.width, p.width, std::int64_t(1), p.depth, p.width, c, sizes.width_row);
      for (std::int64_t first = item % chunks * kChunk; first < last; first += kBlock) {
        const std::int64_t count = std::min(kBlock, last - first);
        read_channels<A, T>(query, n, h, first, count, p.depth, s);
        read_channels<A, T>(grad, n, h, first, count, p.width, g);
        read_positions<A, T>(grad, n, h, first, count, p.width, g_positions, sizes.width_row);
        softmax_of_features(s, p.depth, count, A(1));
        product(s, kBlock, 1, g_positions, sizes.width_row, count, p.depth, p.width, part, sizes.width_row, ones.data());
        product(c, sizes.width_row, 1, g, kBlock, p.width, p.depth, count, ds, kBlock);
        for (std::int64_t j = 0; j < count; j += kWidth<A>) {
          Vec<A> along(A(0));
          for (std::int64_t d = 0; d < p.depth; ++d) along = madd<A>(load(s + d * kBlock + j), load(ds + d * kBlock + j), along);
          for (std::int64_t d = 0; d < p.depth; ++d) {
            A* const at = ds + d * kBlock + j;
            store(at, load(s + d * kBlock + j) * (load(at) - along) * scale);
          }
        }
        write_channels<A, T>(ds, d_query, n, h, first, count, p.depth);
      }
    }
  });
  parallel(p.items(), p.items() * chunks * size, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = begin; head < end; ++head) {
      A* const to = d_context + head * size;
      std::fill_n(to, size, A(0));
      for (std::int64_t i = head * chunks; i < (head + 1) * chunks; ++i)
        for (std::int64_t k = 0; k < size; ++k) to[k] += parts[i * size + k];
      for (std::int64_t k = 0; k < size; ++k) to[k] *= static_cast<A>(p.scale);
    }
  });
}

// dK and dV of the positions of one head, from its dC, the statistics of its keys and sums over e of C dC.
template <class A, class T>
class Positions {
 public:
  explicit Positions(const Problem& problem) : p_(problem), sizes_(problem) {
    for (A** at : {&weights_, &d_keys_}) *at = arena_.take<A>(sizes_.depth_rows * kBlock);
    for (A** at : {&values_, &d_values_}) *at = arena_.take<A>(sizes_.width_rows * kBlock);
    along_ = arena_.take<A>(sizes_.depth_rows);
  }

  void take_head(const A* context, const A* d_context, const A* statistics) {
    d_context_ = d_context, statistics_ = statistics;
    for (std::int64_t d = 0; d < p_.depth; ++d) {
      along_[d] = 0;
      for (std::int64_t e = 0; e < p_.width; ++e) along_[d] += context[d * p_.width + e] * d_context[d * sizes_.width_row + e];
    }
  }

  // Computes a block; `d_keys` and `d_values` then hold it as [channels][kBlock].
  void run(const View& key, const View& value, std::int64_t n, std::int64_t h, std::int64_t first, std::int64_t count) {
    read_channels<A, T>(key, n, h, first, count, p_.depth, weights_);
    read_channels<A, T>(value, n, h, first, count, p_.width, values_);
    product(d_context_, sizes_.width_row, 1, values_, kBlock, p_.width, p_.depth, count, d_keys_, kBlock);
    for (std::int64_t d = 0; d < p_.depth; ++d) {
      exponentials(weights_ + d * kBlock, count, statistics_[d]);
      const A inverse = 1 / statistics_[p_.depth + d];
      for (std::int64_t j = 0; j < count; j += kWidth<A>) {
        A *const weight = weights_ + d * kBlock + j, *const at = d_keys_ + d * kBlock + j;
        store(weight, load(weight) * inverse);
        store(at, load(weight) * (load(at) - along_[d]));
      }
    }
    product(d_context_, 1, sizes_.width_row, weights_, kBlock, p_.depth, p_.width, count, d_values_, kBlock);
  }

  const A* d_keys() const { return d_keys_; }
  const A* d_values() const { return d_values_; }

 private:
  const Problem& p_;
  const Sizes<A> sizes_;
  Arena arena_;
  A *weights_, *d_keys_, *values_, *d_values_, *along_;
  const A *d_context_ = nullptr, *statistics_ = nullptr;
};

// What all passes over keys read of the heads.
template <class A>
struct Heads {
  const A *context, *d_context, *statistics;

  template <class T>
  void give(Positions<A, T>& positions, const Problem& p, std::int64_t head) const {
    positions.take_head(context + head * p.depth * p.width, d_context + head * Sizes<A>(p).context(), statistics + head * 2 * p.depth);
  }
};

template <class A, class T>
void keys_pass(const Problem& p, const Heads<A>& heads, const View& key, const View& value, const View& d_key, const View& d_value) {
  const std::int64_t chunks = chunks_of(p.keys);
  parallel(p.items() * chunks, p.work(), [&](std::int64_t begin, std::int64_t end) {
    Positions<A, T> positions(p);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t head = item / chunks, n = head / p.heads, h = head % p.heads;
      const std::int64_t last = std::min(p.keys, (item % chunks + 1) * kChunk);
      heads.give(positions, p, head);
      for (std::int64_t first = item % chunks * kChunk; first < last; first += kBlock) {
        const std::int64_t count = std::min(kBlock, last - first);
        positions.run(key, value, n, h, first, count);
        write_channels<A, T>(positions.d_keys(), d_key, n, h, first, count, p.depth);
        write_channels<A, T>(positions.d_values(), d_value, n, h, first, count, p.width);
      }
    }
  });
}

// The gradients of the memories: a thread owns heads, and sums over the samples.
template <class A, class T>
void memories_pass(const Problem& p, const Heads<A>& heads, const View& key, const View& value, const View& d_key, const View& d_value) {
  parallel(p.heads, p.n * p.heads * p.memories * p.depth * p.width, [&](std::int64_t begin, std::int64_t end) {
    Positions<A, T> positions(p);
    const Scratch<A> sums((p.depth + p.width) * kBlock);
    A *const of_keys = sums.get(), *const of_values = of_keys + p.depth * kBlock;
    const auto add = [](const A* from, std::int64_t count, A* to) {
      for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];
    };
    for (std::int64_t h = begin; h < end; ++h)
      for (std::int64_t first = 0; first < p.memories; first += kBlock) {
        const std::int64_t count = std::min(kBlock, p.memories - first);
        std::fill_n(sums.get(), (p.depth + p.width) * kBlock, A(0));
        for (std::int64_t n = 0; n < p.n; ++n) {
          heads.give(positions, p, n * p.heads + h);
          positions.run(key, value, n, h, first, count);
          for (std::int64_t d = 0; d < p.depth; ++d) add(positions.d_keys() + d * kBlock, count, of_keys + d * kBlock);
          for (std::int64_t e = 0; e < p.width; ++e) add(positions.d_values() + e * kBlock, count, of_values + e * kBlock);
        }
        write_channels<A, T>(of_keys, d_key, 0, h, first, count, p.depth);
        write_channels<A, T>(of_values, d_value, 0, h, first, count, p.width);
      }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                                        const Tensor& value, OptionalTensor memory_key,
                                                                        OptionalTensor memory_value, const Tensor& context,
                                                                        const Tensor& statistics, double scale) {
  const char* const op = "linear_attention_bwd";
  const Problem p = make_problem(op, query, key, value, memory_key, memory_value, scale);
  const ScalarType dtype = query.scalar_type(), opmath = opmath_type(dtype);
  FASTGEN_CHECK(grad_output.scalar_type() == dtype && (sizes_of(grad_output) == std::vector{p.n, p.heads, p.width, p.length}), op,
                ": grad_output must be [N, H, E, L] in the dtype of query");
  FASTGEN_CHECK(context.scalar_type() == opmath && (sizes_of(context) == std::vector{p.n, p.heads, p.depth, p.width}), op,
                ": context must be [N, H, D, E] in the dtype of the arithmetic");
  FASTGEN_CHECK(statistics.scalar_type() == opmath && (sizes_of(statistics) == std::vector<std::int64_t>{p.n, p.heads, 2, p.depth}), op,
                ": statistics must be [N, H, 2, D] in the dtype of the arithmetic");
  const Tensor dense_context = as_dense(context, false), dense_statistics = as_dense(statistics, false);
  Tensor d_query = empty_in_order_of(query, sizes_of(query)), d_key = empty_in_order_of(key, sizes_of(key));
  Tensor d_value = empty_in_order_of(value, sizes_of(value));
  const auto like_memory = [&](const OptionalTensor& memory) {
    return empty_contiguous(memory.has_value() ? sizes_of(*memory) : std::vector<std::int64_t>{0}, dtype);
  };
  Tensor d_memory_key = like_memory(memory_key), d_memory_value = like_memory(memory_value);
  dispatch_dtype(op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    const auto* const c = static_cast<const A*>(dense_context.data_ptr());
    const Scratch<A> d_context(p.items() * Sizes<A>(p).context());
    queries_pass<A, T>(p, View(query), View(grad_output), c, View(d_query), d_context.get());
    const Heads<A> heads{c, d_context.get(), static_cast<const A*>(dense_statistics.data_ptr())};
    keys_pass<A, T>(p, heads, View(key), View(value), View(d_key), View(d_value));
    if (p.memories > 0)
      memories_pass<A, T>(p, heads, view_of_memory(*memory_key), view_of_memory(*memory_value), view_of_memory(d_memory_key),
                          view_of_memory(d_memory_value));
  });
  return {d_query, d_key, d_value, d_memory_key, d_memory_value};
}

}  // namespace
}  // namespace fastgen::linear_attention

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("linear_attention_bwd", TORCH_BOX(&fastgen::linear_attention::linear_attention_bwd)); }
