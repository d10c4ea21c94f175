// linear_attention, forward: the context of each head, then its product with the softmax of the queries.
//
//   context[d][e] = sum over positions of softmax(k)[d][l] v[e][l],  output[e][l] = scale sum over d of context[d][e] softmax(q)[d][l]
//
// Keys and values are read once: a thread owns a chunk of positions of one head and goes through it block by block with the running
// maximum and sum of each feature; the contexts of the chunks, the memories' first, are put together in order. Queries are read once:
// a thread owns a chunk again, block by block through the softmax of each position and the product. Chunks depend on the shape alone,
// so the bits do not depend on the number of threads. Arithmetic is in fp32, fp64 for fp64.
#include "linear_attention.h"

namespace fastgen::linear_attention {
namespace {

// What chunks leave of one feature: [D] maxima and sums, and the context [D][row], not yet divided by the sums.
template <class A>
struct Parts {
  std::int64_t rows, row, size;  // rows: D in whole tiles
  A* memory;

  A* high(std::int64_t chunk) const { return memory + chunk * size; }
  A* sum(std::int64_t chunk) const { return high(chunk) + rows; }
  A* context(std::int64_t chunk) const { return sum(chunk) + rows; }
};

// The positions [first, last) of keys and values into one chunk's part.
template <class A, class T>
struct Gather {
  const Problem& p;
  const Parts<A>& parts;
  Arena arena;
  A *keys, *values, *factor;

  Gather(const Problem& problem, const Parts<A>& of) : p(problem), parts(of) {
    keys = arena.take<A>(of.rows * kBlock), values = arena.take<A>(kBlock * of.row), factor = arena.take<A>(of.rows);
  }

  void run(const View& key, const View& value, std::int64_t n, std::int64_t h, std::int64_t first, std::int64_t last, std::int64_t part) {
    constexpr A never = -std::numeric_limits<A>::infinity();
    A *const high = parts.high(part), *const sum = parts.sum(part);
    std::fill_n(high, parts.rows, never);
    std::fill_n(sum, (parts.row + 1) * parts.rows, A(0));  // the context lies behind
    for (; first < last; first += kBlock) {
      const std::int64_t count = std::min(kBlock, last - first), lanes = round_up(count, kLanes<A>);
      read_channels<A, T>(key, n, h, first, count, p.depth, keys);
      read_positions<A, T>(value, n, h, first, count, p.width, values, parts.row);
      for (std::int64_t d = 0; d < p.depth; ++d) {
        A* const k = keys + d * kBlock;
        std::fill(k + count, k + lanes, never);
        Vec<A> above(high[d]);
        for (std::int64_t j = 0; j < lanes; j += kWidth<A>) above = stdx::max(above, load(k + j));
        const A top = stdx::hmax(above), safe = top == never ? A(0) : top;  // no key so far: every exponential is 0
        factor[d] = std::exp(high[d] - safe);
        sum[d] = sum[d] * factor[d] + exponentials(k, count, safe);
        high[d] = top;
      }
      product(keys, kBlock, 1, values, parts.row, count, p.depth, p.width, parts.context(part), parts.row, factor);
    }
  }
};

// The context [D][E], the maxima and the sums [D] of one head, of `count` parts from `first` on.
template <class A>
void put_together(const Problem& p, const Parts<A>& parts, std::int64_t first, std::int64_t count, A* context, A* highest, A* sums) {
  for (std::int64_t d = 0; d < p.depth; ++d) {
    A top = -std::numeric_limits<A>::infinity(), total = 0;
    for (std::int64_t i = first; i < first + count; ++i) top = std::max(top, parts.high(i)[d]);
    std::fill_n(context + d * p.width, p.width, A(0));
    for (std::int64_t i = first; i < first + count; ++i) {
      const A factor = top == parts.high(i)[d] ? A(1) : std::exp(parts.high(i)[d] - top), *const part = parts.context(i) + d * parts.row;
      total += parts.sum(i)[d] * factor;
      for (std::int64_t e = 0; e < p.width; ++e) context[d * p.width + e] += part[e] * factor;
    }
    highest[d] = top, sums[d] = total;
    if (p.keys + p.memories == 0) continue;
    for (std::int64_t e = 0; e < p.width; ++e) context[d * p.width + e] /= total;
  }
}

template <class A, class T>
void make_context(const Problem& p, const View& key, const View& value, const View& memory_key, const View& memory_value, A* context,
                  A* statistics) {
  const std::int64_t chunks = chunks_of(p.keys), of_head = chunks + (p.memories > 0);
  Parts<A> parts{round_up(p.depth, kTall), round_up(p.width, kUnit<A>), 0, nullptr};
  parts.size = parts.rows * (parts.row + 2);
  const Scratch<A> memory(p.items() * of_head * parts.size);
  parts.memory = memory.get();
  parallel(p.items() * of_head, p.work(), [&](std::int64_t begin, std::int64_t end) {
    Gather<A, T> gather(p, parts);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t head = item / of_head, chunk = item % of_head - (p.memories > 0), n = head / p.heads, h = head % p.heads;
      if (chunk < 0) gather.run(memory_key, memory_value, n, h, 0, p.memories, item);
      else gather.run(key, value, n, h, chunk * kChunk, std::min(p.keys, (chunk + 1) * kChunk), item);
    }
  });
  parallel(p.items(), p.items() * of_head * parts.size, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = begin; head < end; ++head)
      put_together(p, parts, head * of_head, of_head, context + head * p.depth * p.width, statistics + head * 2 * p.depth,
                   statistics + (head * 2 + 1) * p.depth);
  });
}

template <class A, class T>
void make_output(const Problem& p, const View& query, const A* context, const View& output) {
  const std::int64_t chunks = chunks_of(p.length), rows = round_up(p.depth, kTall), row = round_up(p.width, kUnit<A>);
  parallel(p.items() * chunks, p.work(), [&](std::int64_t begin, std::int64_t end) {
    Arena arena;
    A *const queries = arena.take<A>(rows * kBlock), *const values = arena.take<A>(rows * row), *const out = arena.take<A>(row * kBlock);
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t head = item / chunks, n = head / p.heads, h = head % p.heads;
      const std::int64_t last = std::min(p.length, (item % chunks + 1) * kChunk);
      read_panel<A>(context + head * p.depth * p.width, p.width, std::int64_t(1), p.depth, p.width, values, row);
      for (std::int64_t first = item % chunks * kChunk; first < last; first += kBlock) {
        const std::int64_t count = std::min(kBlock, last - first);
        read_channels<A, T>(query, n, h, first, count, p.depth, queries);
        softmax_of_features(queries, p.depth, count, static_cast<A>(p.scale));
        product(values, std::int64_t(1), row, queries, kBlock, p.depth, p.width, count, out, kBlock);
        write_channels<A, T>(out, output, n, h, first, count, p.width);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> run(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                       const OptionalTensor& memory_key, const OptionalTensor& memory_value, double scale) {
  const Problem p = make_problem(op, query, key, value, memory_key, memory_value, scale);
  const ScalarType dtype = query.scalar_type(), opmath = opmath_type(dtype);
  Tensor output = empty_in_order_of(query, {p.n, p.heads, p.width, p.length});
  Tensor context = empty_contiguous({p.n, p.heads, p.depth, p.width}, opmath), statistics = empty_contiguous({p.n, p.heads, 2, p.depth}, opmath);
  dispatch_dtype(op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    A* const c = static_cast<A*>(context.mutable_data_ptr());
    const bool memories = p.memories > 0;
    make_context<A, T>(p, View(key), View(value), memories ? view_of_memory(*memory_key) : View(),
                       memories ? view_of_memory(*memory_value) : View(), c, static_cast<A*>(statistics.mutable_data_ptr()));
    make_output<A, T>(p, View(query), c, View(output));
  });
  return {output, context, statistics};
}

Tensor linear_attention(const Tensor& query, const Tensor& key, const Tensor& value, OptionalTensor memory_key, OptionalTensor memory_value,
                        double scale) {
  return std::get<0>(run("linear_attention", query, key, value, memory_key, memory_value, scale));
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value,
                                                        OptionalTensor memory_key, OptionalTensor memory_value, double scale) {
  return run("linear_attention_fwd", query, key, value, memory_key, memory_value, scale);
}

}  // namespace
}  // namespace fastgen::linear_attention

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&fastgen::linear_attention::linear_attention));
  m.impl("linear_attention_fwd", TORCH_BOX(&fastgen::linear_attention::linear_attention_fwd));
}
