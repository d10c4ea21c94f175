// attention, forward: flash attention with query rows in the lanes (_tiles.h).
//
// Keys and values are packed once a head, by all threads, as the products read them: dense rows of fp32; pairs of bf16 where there is a
// fast instruction for their dot product; tiles of pairs where there is a matrix unit (_matrix_products.h). Then a thread owns a block of
// query rows of one head: panels of F::lanes rows, transposed once. The panels go by for a span of keys that stays in the second-level
// cache; a panel goes through it block by block, and its scores of one block stay in the first-level cache: maximum, exponentials, product
// with the values. A length that fits one block, such as 77, is never rescaled. Blocks depend on the shape alone, so the bits do not
// depend on the number of threads. Heads of up to 8 elements have a way of their own with AVX-512 (attention_narrow.h).
#include "_matrix_products.h"
#include "attention.h"
#include "attention_narrow.h"

namespace fastgen::attention {
namespace {

// Caches as two threads of a core leave them to each other: half of 32 KB and half of 512 KB.
constexpr std::int64_t kKeys = 96;             // keys of a block: its scores are 9 KB in fp32 with 8 lanes a vector
constexpr std::int64_t kBlockBytes = 1 << 17;  // of the keys and values of a block at the most
constexpr std::int64_t kRowBytes = 1 << 16;    // of the queries and outputs of a block of rows, where that is kLeastPanels or more
constexpr std::int64_t kLeastPanels = 4, kMostPanels = 16;
constexpr std::int64_t kItems = 64;            // blocks of rows wanted in all, so that many threads have work
constexpr std::int64_t kPackBytes = 1 << 25;   // of the keys and values that are packed at a time, where that is more than one head

// The same over matrix tiles, on an Intel Xeon of 48 KB and 2 MB a core: more keys than kKeys are cut so that the unit is never left for
// longer than it stays awake, unless values are so wide that bringing their sums back takes more.
constexpr std::int64_t kTiledKeys = 64, kTiledKeysOfWide = 192, kWideValues = 96;
constexpr std::int64_t kSpanBytes = 1 << 20;   // of the keys and values of a span

struct Blocks {
  std::int64_t rows, row_blocks, keys, span;  // span: keys that the panels of a block of rows go through one after the other

  template <class F, class A>
  static Blocks of(const Problem& p) {
    constexpr std::int64_t lanes = F::lanes;
    const std::int64_t bytes = std::max<std::int64_t>(p.depth + p.width, 1) * static_cast<std::int64_t>(sizeof(A));
    const std::int64_t panels = std::clamp(kRowBytes / (bytes * lanes), kLeastPanels, kMostPanels);
    const std::int64_t share = std::max(p.n * p.heads * p.rows / kItems, kLeastPanels * lanes);
    const std::int64_t rows = block_length(p.rows, std::min(panels * lanes, share), lanes);
    const std::int64_t tiled = p.keys <= kKeys ? kKeys : p.width <= kWideValues ? kTiledKeys : kTiledKeysOfWide;
    const std::int64_t keys = kTiled<F> ? tiled : std::clamp<std::int64_t>(kBlockBytes / bytes / 16 * 16, 32, kKeys);
    const std::int64_t block = block_length(p.keys, keys, std::max(2, F::deep * F::count));
    return {rows, (p.rows + rows - 1) / rows, block, kTiled<F> ? std::max(kSpanBytes / (bytes / 2) / block, std::int64_t(1)) * block : block};
  }
};

// Asks for rows early, where they lie in whole lines: between short keys memory is what would be waited for.
template <class T, class Ask>
void ask_for_rows(T* first, const View& view, std::int64_t rows, std::int64_t columns, const Ask& ask) {
  if (view.column != 1) return;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; c += static_cast<std::int64_t>(64 / sizeof(T))) ask(first + r * view.row + c);
}

// Keys and values of some heads as the products read them: of each head rows of keys, zeros up to the next whole tile, rows of values.
// F says how factors are stored; F::count rows of values are one.
template <class F, class A>
class Packed {
 public:
  using E = typename F::Element;
  const std::int64_t terms, key_row, value_row, key_rows, head_size, most;  // terms: of one score, in elements; most: heads at a time

  explicit Packed(const Problem& problem)
      : terms(round_up((problem.depth + F::count - 1) / F::count, F::deep)),
        key_row(round_up(terms, F::unit)),
        value_row(round_up(problem.width, F::unit)),
        key_rows(round_up(problem.keys, F::tall)),
        head_size(key_rows * key_row + round_up((problem.keys + F::count - 1) / F::count, F::deep) * value_row),
        most(std::clamp<std::int64_t>(kPackBytes / std::max<std::int64_t>(head_size * sizeof(E), 1), 1, problem.n * problem.kv_heads)),
        p(problem),
        memory(arena.take_as_it_is<E>(most * head_size)) {
    if (kTiled<F>) return;  // whose tiles are written whole
    for (std::int64_t slot = 0; slot < most; ++slot) std::fill_n(memory + slot * head_size + p.keys * key_row, (key_rows - p.keys) * key_row, E(0));
  }

  const E* keys(std::int64_t slot, std::int64_t first) const { return memory + slot * head_size + first * key_row; }
  const E* values(std::int64_t slot, std::int64_t first) const { return keys(slot, key_rows) + first / F::count * value_row; }

  // Heads [head, head + count) of all N Hk into slots 0, 1, ...
  template <class T>
  void read(std::int64_t head, std::int64_t count, const View& key, const View& value) {
    const std::int64_t parts = (p.keys + kKeys - 1) / kKeys;
    parallel(count * parts, count * head_size, [&](std::int64_t begin, std::int64_t end) {
      Arena own;
      A* staged = std::is_same_v<F, Pairs> ? own.take<A>((kKeys + 1) * value_row) : nullptr;
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t slot = item / parts, n = (head + slot) / p.kv_heads, h = (head + slot) % p.kv_heads;
        const std::int64_t first = item % parts * kKeys, rows = std::min(kKeys, p.keys - first);
        const T *k = key.at<const T>(n, h, first), *v = value.at<const T>(n, h, first);
        E *to_keys = const_cast<E*>(keys(slot, first)), *to_values = const_cast<E*>(values(slot, first));
        if constexpr (kTiled<F>) {
          constexpr std::int64_t tall = F::tall, wide = F::deep * F::count;
          const auto ask = [](const T* next) { prefetch(next); };
          for (std::int64_t i = 0; i < rows; i += tall) {
            ask_for_rows(k + (i + tall) * key.row, key, std::min(tall, p.keys - first - i - tall), p.depth, ask);
            for (std::int64_t e = 0; e < p.depth; e += wide, to_keys += F::words)
              read_tile<false>(k + i * key.row + e * key.column, key.row, key.column, rows - i, p.depth - e, to_keys, F::tile);
          }
          for (std::int64_t i = 0; i < rows; i += wide) {
            ask_for_rows(v + (i + wide) * value.row, value, std::min(wide, p.keys - first - i - wide), p.width, ask);
            for (std::int64_t e = 0; e < p.width; e += tall, to_values += F::words)
              read_tile<false>(v + i * value.row + e * value.column, value.column, value.row, p.width - e, rows - i, to_values, F::tile);
          }
        } else if constexpr (std::is_same_v<E, A>) {
          read_panel<A>(k, key.row, key.column, rows, p.depth, to_keys, key_row);
          read_panel<A>(v, value.row, value.column, rows, p.width, to_values, value_row);
        } else {
          if (p.depth % 2) std::fill_n(to_keys, rows * key_row, E(0));  // the last element's neighbour
          read_pairs(k, key.row, key.column, rows, p.depth, to_keys, key_row);
          read_panel<A>(v, value.row, value.column, rows, p.width, staged, value_row);
          if (rows % 2) std::fill_n(staged + rows * value_row, value_row, A(0));
          pair_rows(staged, value_row, (rows + 1) / 2, value_row, to_values);
        }
      }
    });
  }

 private:
  const Problem& p;
  Arena arena;
  E* memory;
};

// The largest of `count` rows of vectors, -Inf of none; by two chains, since one is waited for.
template <class A, int wide>
FASTGEN_INLINE void largest(const A* rows, std::int64_t row, std::int64_t count, SideBySide<A, wide>& high) {
  Vec<A> other[wide];
  for (int v = 0; v < wide; ++v) high[v] = other[v] = Vec<A>(-std::numeric_limits<A>::infinity());
  for (std::int64_t k = 0; k + 2 <= count; k += 2, rows += 2 * row)
    for (int v = 0; v < wide; ++v) {
      high[v] = stdx::max(high[v], load(rows + v * kWidth<A>));
      other[v] = stdx::max(other[v], load(rows + row + v * kWidth<A>));
    }
  for (int v = 0; v < wide; ++v) {
    if (count % 2) high[v] = stdx::max(high[v], load(rows + v * kWidth<A>));
    high[v] = stdx::max(high[v], other[v]);
  }
}

// What one thread works in: the panels of its rows, and one panel's scores of one block of keys, which become its weights in place.
template <class F, class A>
struct Block {
  using E = typename F::Element;
  static constexpr int lanes = F::lanes;
  Arena arena;
  const Problem& p;
  const Packed<F, A>& packed;
  std::int64_t panel_size, output_size;
  E *queries, *weights;
  A *output, *scores, *bias, *staged, *highest, *total, *factor;

  Block(const Problem& problem, const Packed<F, A>& of_keys, const Blocks& b) : p(problem), packed(of_keys) {
    const std::int64_t panels = b.rows / lanes;
    panel_size = packed.terms * lanes, output_size = packed.value_row * lanes;
    queries = arena.take<E>(panels * panel_size);
    output = arena.take<A>(panels * output_size);
    scores = arena.take<A>((round_up(b.keys, F::unit) + 1) * lanes);
    weights = reinterpret_cast<E*>(scores);
    highest = arena.take<A>(b.rows), total = arena.take<A>(b.rows), factor = arena.take<A>(lanes);
    bias = arena.take<A>(b.keys * lanes);
    staged = std::is_same_v<F, Pairs> ? arena.take<A>((p.depth + 1) * lanes) : nullptr;
  }
  Block(const Block&) = delete;

  template <class T>
  void read_queries(std::int64_t panel, const T* q, const View& view, std::int64_t rows) {
    E* to = queries + panel * panel_size;
    if constexpr (kTiled<F>) {
      for (std::int64_t e = 0; e < packed.terms; e += F::deep, to += F::deep * lanes)
        for (std::int64_t r = 0; r < rows; r += F::tile)
          read_tile<true>(q + r * view.row + e * F::count * view.column, view.row, view.column, rows - r, p.depth - e * F::count, to + r, lanes);
    } else if constexpr (std::is_same_v<E, A>) {
      read_panel<A>(q, view.column, view.row, p.depth, rows, to, lanes);
    } else {
      read_panel<A>(q, view.column, view.row, p.depth, rows, staged, lanes);
      if (p.depth % 2) std::fill_n(staged + p.depth * lanes, lanes, A(0));
      pair_rows(staged, lanes, packed.terms, rows, to);
    }
  }

  // Keys [key, key + count) of a slot for one panel: `rows` rows from `row` on, of `wide` vectors.
  template <int wide>
  void attend(std::int64_t panel, std::int64_t slot, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, std::int64_t key,
              std::int64_t count) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    Vec<A> high[wide], sum[wide], change[wide];
    for (auto& v : sum) v = Vec<A>(A(0));
    A scale = static_cast<A>(p.scale * kLog2E);
    const bool biased = p.mask || (p.causal && key + count > row + 1) || !(scale > 0);  // else the scale waits for the exponential
    multiply_by_keys<wide>(panel, slot, key, count);
    if (biased) {
      read_bias<A, lanes>(p, n, h, row, rows, key, count, bias);
      for (std::int64_t i = 0; i < count * lanes; i += kWidth<A>)
        store(scores + i, madd<A>(load(scores + i), Vec<A>(scale), load(bias + i) * static_cast<A>(kLog2E)));
      scale = 1;
    }
    largest<A, wide>(scores, lanes, count, high);
    A *top = highest + panel * lanes, *all = total + panel * lanes;
    bool same = true;
    for (int v = 0; v < wide; ++v) {
      const Vec<A> before = key == 0 ? Vec<A>(-infinity) : load(top + v * kWidth<A>);
      high[v] *= scale;
      stdx::where(!(high[v] > before + A(kSlack)), high[v]) = before;
      store(top + v * kWidth<A>, high[v]);
      stdx::where(high[v] == -infinity, high[v]) = A(0);  // no key so far: every exponential is 0, not that of -Inf + Inf
      change[v] = before - high[v];
      same = same && stdx::all_of(change[v] == A(0));
    }
    exp2(change);
    for (int v = 0; v < wide; ++v) store(factor + v * kWidth<A>, change[v]);
    for (auto& v : high) v = -v;
    const A* from = scores;
    E* to = weights;
    for (std::int64_t k = 0; k < count; k += F::count, from += F::count * lanes, to += lanes) {
      if (k % 48 == 32) stay_awake<F>();
      Vec<A> weight[F::count][wide];
      for (int j = 0; j < F::count; ++j) {
        if (k + j < count) {
          for (int v = 0; v < wide; ++v) weight[j][v] = madd<A>(load(from + j * lanes + v * kWidth<A>), Vec<A>(scale), high[v]);
          short_exp2<A>(weight[j]);
        } else {
          for (int v = 0; v < wide; ++v) weight[j][v] = Vec<A>(A(0));
        }
        for (int v = 0; v < wide; ++v) sum[v] += weight[j][v];
      }
      for (int v = 0; v < wide; ++v) {
        if constexpr (std::is_same_v<E, A>) store(to + v * kWidth<A>, weight[0][v]);
        else make_positive_pairs(weight[0][v], weight[1][v]).copy_to(to + v * kWidth<A>, stdx::element_aligned);
      }
    }
    for (int v = 0; v < wide; ++v) {
      A* at = all + v * kWidth<A>;
      store(at, key == 0 ? sum[v] : madd<A>(load(at), load(factor + v * kWidth<A>), sum[v]));
    }
    multiply_by_values<wide>(panel, slot, key, count, same);
  }

  // The scores of one panel.
  template <int wide>
  void multiply_by_keys(std::int64_t panel, std::int64_t slot, std::int64_t key, std::int64_t count) {
    const E *keys = packed.keys(slot, key), *of_panel = queries + panel * panel_size;
    if constexpr (kTiled<F>) multiply_keys_by_tiles<wide * kWidth<A> / F::tile>(keys, round_up(count, F::tall) / F::tall, packed.terms / F::deep, of_panel, scores);
    else multiply_keys<F, A, wide>(keys, packed.key_row, count, of_panel, packed.terms, scores);
  }

  // The output of one panel, scaled by `factor` unless that is 1 (`same`), and the product of these keys' weights and values.
  template <int wide>
  void multiply_by_values(std::int64_t panel, std::int64_t slot, std::int64_t key, std::int64_t count, bool same) {
    const E* values = packed.values(slot, key);
    A* to = output + panel * output_size;
    const std::int64_t terms = (count + F::count - 1) / F::count;
    if constexpr (kTiled<F>) {
      const std::int64_t deep = round_up(terms, F::deep);
      std::fill_n(weights + terms * lanes, (deep - terms) * lanes, E(0));
      for (std::int64_t e = 0; key > 0 && !same && e < p.width; ++e)
        for (int v = 0; v < wide * kWidth<A>; v += kWidth<A>) store(to + e * lanes + v, load(to + e * lanes + v) * load(factor + v));
      multiply_values_by_tiles<wide * kWidth<A> / F::tile>(values, packed.value_row / F::tall, deep / F::deep, weights, key == 0, to);
    } else {
      multiply_values<F, A, wide>(values, packed.value_row, p.width, weights, terms, key == 0 ? nullptr : factor, to);
    }
  }

  // The panel's rows of the output, and their logsumexp where that is wanted; 0 and -Inf for a row that saw no key.
  template <class T>
  void write(std::int64_t panel, T* out, const View& view, A* logsumexp, std::int64_t rows) {
    A *from = output + panel * output_size, *all = total + panel * lanes, *top = highest + panel * lanes;
    for (std::int64_t r = 0; r < rows; ++r) {
      if (logsumexp != nullptr) logsumexp[r] = static_cast<A>((top[r] + std::log2(all[r])) / kLog2E);
      factor[r] = all[r] == 0 ? A(0) : 1 / all[r];
    }
    write_panel<A>(from, lanes, p.width, rows, out, view.column, view.row, factor);
  }
};

template <class T, class F>
void forward(const Problem& p, const View& query, const View& key, const View& value, const View& output, opmath_t<T>* logsumexp) {
  using A = opmath_t<T>;
  const Blocks blocks = Blocks::of<F, A>(p);
  Packed<F, A> packed(p);
  const std::int64_t all = p.n * p.kv_heads;
  for (std::int64_t begin_head = 0; begin_head < all; begin_head += packed.most) {
    const std::int64_t slots = std::min(packed.most, all - begin_head);
    packed.template read<T>(begin_head, slots, key, value);
    parallel(slots * p.group() * blocks.row_blocks, p.work() / all * slots, [&](std::int64_t begin, std::int64_t end) {
      Block<F, A> block(p, packed, blocks);
      [[maybe_unused]] const Unit<F> unit;
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t head = begin_head * p.group() + item / blocks.row_blocks, n = head / p.heads, h = head % p.heads;
        const std::int64_t slot = head / p.group() - begin_head;
        const std::int64_t first = item % blocks.row_blocks * blocks.rows, rows = std::min(blocks.rows, p.rows - first);
        const auto each_panel = [&](auto&& work) {
          for (std::int64_t r = 0; r < rows; r += F::lanes) work(r / F::lanes, first + r, std::min<std::int64_t>(F::lanes, rows - r));
        };
        each_panel([&](std::int64_t panel, std::int64_t row, std::int64_t count) {
          block.read_queries(panel, query.at<const T>(n, h, row), query, count);
        });
        const std::int64_t keys = p.visible(first + rows);
        for (std::int64_t begin_key = 0; begin_key < keys; begin_key += blocks.span) {
          each_panel([&](std::int64_t panel, std::int64_t row, std::int64_t panel_rows) {
            if (begin_key == 0) {  // what the next block of rows reads, and what this one writes
              const std::int64_t next = row + blocks.rows;
              if (next < p.rows)
                ask_for_rows(query.at<const T>(n, h, next), query, std::min(panel_rows, p.rows - next), p.depth, [](const T* q) { prefetch(q); });
              ask_for_rows(output.at<T>(n, h, row), output, panel_rows, p.width, [](T* to) { prefetch_to_write(to); });
            }
            const std::int64_t end = std::min({keys, begin_key + blocks.span, round_up(p.visible(row + panel_rows), blocks.keys)});
            with_vectors<F, A>(panel_rows, [&](auto wide) {
              for (std::int64_t k = begin_key; k < end; k += blocks.keys)
                block.template attend<wide>(panel, slot, n, h, row, panel_rows, k, std::min(blocks.keys, keys - k));
            });
          });
        }
        each_panel([&](std::int64_t panel, std::int64_t row, std::int64_t count) {
          block.write(panel, output.at<T>(n, h, row), output, logsumexp == nullptr ? nullptr : logsumexp + head * p.rows + row, count);
        });
      }
    });
  }
}

std::tuple<Tensor, Tensor> run(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
                               bool causal, double scale, bool wants_logsumexp) {
  const Problem p = make_problem(op, query, key, value, mask, causal, scale);
  const ScalarType dtype = query.scalar_type();
  Tensor output = empty_in_order_of(query, {p.n, p.heads, p.rows, p.width});
  Tensor logsumexp = empty_contiguous({p.n, p.heads, wants_logsumexp ? p.rows : 0}, opmath_type(dtype));
  dispatch_dtype(op, dtype, [&]<class T>() {
    using A = opmath_t<T>;
    auto* statistics = wants_logsumexp ? static_cast<A*>(logsumexp.mutable_data_ptr()) : nullptr;
    if (p.n * p.heads * p.rows == 0) return;
    if (p.keys == 0) {
      std::memset(output.mutable_data_ptr(), 0, output.numel() * sizeof(T));
      if (wants_logsumexp) std::fill_n(statistics, logsumexp.numel(), -std::numeric_limits<A>::infinity());
      return;
    }
    if constexpr (kHasNarrow && std::is_same_v<A, float> && !(matrix_tiles::kAvailable && std::is_same_v<T, BFloat16>))
      if (is_narrow(p) && !(std::is_same_v<T, BFloat16> && pairs_are_fast()))
        return forward_narrow<T>(p, View(query), View(key), View(value), View(output), statistics);
    const auto run_by = [&]<class F>() { forward<T, F>(p, View(query), View(key), View(value), View(output), statistics); };
    if constexpr (matrix_tiles::kAvailable && std::is_same_v<T, BFloat16>) return run_by.template operator()<TiledPairs>();
    if constexpr (kHasPairs && !matrix_tiles::kAvailable && std::is_same_v<T, BFloat16>)
      if (pairs_are_fast()) return run_by.template operator()<Pairs>();
    if constexpr (!matrix_tiles::kAvailable || !std::is_same_v<T, BFloat16>) run_by.template operator()<Singles<A>>();
  });
  return {output, logsumexp};
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, OptionalTensor attn_mask, bool is_causal, double scale) {
  return std::get<0>(run("attention", query, key, value, attn_mask, is_causal, scale, false));
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& query, const Tensor& key, const Tensor& value, OptionalTensor attn_mask,
                                         bool is_causal, double scale) {
  return run("attention_fwd", query, key, value, attn_mask, is_causal, scale, true);
}

}  // namespace
}  // namespace fastgen::attention

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastgen::attention::attention));
  m.impl("attention_fwd", TORCH_BOX(&fastgen::attention::attention_fwd));
}
