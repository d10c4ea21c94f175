// attention, backward: the scores are computed again from their logsumexp, and with P the weights and D = sum over e of dO O
//
//   dV = P^T dO,  dS = P (dO V^T - D),  dQ = scale dS K,  dK = scale dS^T Q
//
// A thread owns a chunk of the keys of one head: its dK and dV are summed in place while the rows go by in blocks, in order. Rows
// get a part of dQ from each chunk, and the parts are added in order; few chunks, since each part is as large as dQ. Chunks depend
// on the shape alone, so the bits do not depend on the number of threads. Arithmetic is in fp32, fp64 for fp64, whatever is stored.
#include "attention_bwd.h"
#include "attention_bwd_tiles.h"

namespace fastgen::attention {
namespace {

constexpr std::int64_t kRowBytes = 128 << 10;  // of what a block of rows keeps, a quarter of the second-level cache: keys, values and
constexpr std::int64_t kLeastPanels = 2, kMostPanels = 6;  // their gradients go by once for as many rows
constexpr std::int64_t kKeys = 64;       // of a block: its weights and d_scores for 96 rows are 48 KB in fp32
constexpr std::int64_t kItems = 64;      // pieces of work wanted: heads of keys times chunks

// to[k][e] += sum over rows i of from[k][i] right[i][e] for k < count and e < columns; `from` lies in panels of rows, as scores do.
template <class F, class A>
void multiply_rows(const typename F::Element* from, std::int64_t panel_size, std::int64_t rows, const typename F::Element* right,
                   std::int64_t count, std::int64_t columns, A* to, std::int64_t to_row) {
  constexpr std::int64_t lanes = F::lanes, terms = lanes / F::count;  // of a panel
  for (std::int64_t e = 0; e < columns; e += kLanes<A>)
    with_width<A>(columns - e, [&](auto width) {
      constexpr int wide = width;
      for (std::int64_t k = 0; k < count; k += kTall) {
        Tile<A, wide> sum;
        clear<A, wide>(sum);
        for (std::int64_t r = 0; r < rows; r += lanes)
          multiply<F, A, wide>(from + r / lanes * panel_size + k * terms, terms, 1, right + r / F::count * to_row + e, to_row,
                               (std::min(lanes, rows - r) + F::count - 1) / F::count, sum);
        for (int i = 0; i < kTall; ++i)
          for (int v = 0; v < wide; ++v) {
            A* at = to + (k + i) * to_row + e + v * kWidth<A>;
            store(at, load(at) + sum[i][v]);
          }
      }
    });
}

// What one thread works in: a chunk of keys and values with their gradients, and a block of rows.
template <class Factors, class A>
struct Chunk {
  using F = Factors;
  using E = typename F::Element;
  static constexpr std::int64_t lanes = F::lanes, block = kKeys, items = kItems, panel_size = block * lanes / F::count;
  static constexpr bool paired = F::count == 2;
  Arena arena;
  const Problem& p;
  std::int64_t key_row, value_row, most_keys, key_terms, value_terms;  // terms: of a sum over e
  E *keys, *values, *key_columns;                        // [keys][terms]; [keys / count][key_row], as a sum over keys reads them
  A *d_keys, *d_values;                                  // [keys][key_row or value_row]
  E *queries, *grads, *query_rows, *grad_rows;           // panels [terms][lanes]; [L / count][key_row or value_row]
  E *weights, *d_scores, *d_score_pairs;                 // panels [keys][lanes / count]; of one panel [keys / count][lanes]
  A *d_queries, *scores, *d_weights, *bias, *outputs;    // panels [E][lanes]; of one panel [keys][lanes], [Ev][lanes]
  A *logsumexp, *delta, *ones, *staged;                  // of each row, logsumexp in powers of two; rows that are to be paired

  Chunk(const Problem& problem, const Chunks& chunks)
      : p(problem),
        key_row(round_up(p.depth, F::unit)),
        value_row(round_up(p.width, F::unit)),
        most_keys(chunks.keys),
        key_terms((p.depth + F::count - 1) / F::count),
        value_terms((p.width + F::count - 1) / F::count) {
    const std::int64_t rows = most_rows(p);
    keys = arena.take<E>(most_keys * key_row), values = arena.take<E>(most_keys * value_row);
    d_keys = arena.take<A>(most_keys * key_row), d_values = arena.take<A>(most_keys * value_row);
    queries = arena.take<E>(rows * key_row), query_rows = arena.take<E>(rows * key_row);
    grads = arena.take<E>(rows * value_row), grad_rows = arena.take<E>(rows * value_row);
    d_queries = arena.take<A>(rows * key_row);
    for (E** at : {&weights, &d_scores}) *at = arena.take<E>(rows * block);
    for (A** at : {&scores, &d_weights, &bias}) *at = arena.take<A>(block * lanes);
    outputs = arena.take<A>(value_row * lanes);
    logsumexp = arena.take<A>(rows), delta = arena.take<A>(rows), ones = arena.take<A>(lanes);
    std::fill_n(ones, lanes, A(1));
    key_columns = paired ? arena.take<E>(most_keys * key_row) : keys;
    d_score_pairs = paired ? arena.take<E>(block * lanes) : nullptr;
    staged = paired ? arena.take<A>((std::max(key_row, value_row) + 1) * (lanes + 1)) : nullptr;
  }
  Chunk(const Chunk&) = delete;

  // Of a block: queries and gradients both ways, and the gradient of the queries.
  static std::int64_t most_rows(const Problem& p) {
    const std::int64_t factors = 2 * (p.depth + p.width) * static_cast<std::int64_t>(sizeof(E)) / F::count;
    const std::int64_t bytes = (factors + p.depth * static_cast<std::int64_t>(sizeof(A))) * lanes;
    return std::min(std::clamp(kRowBytes / std::max<std::int64_t>(bytes, 1), kLeastPanels, kMostPanels) * lanes, round_up(p.rows, lanes));
  }

  // x[rows][columns], one of them at most `lanes`, as the factor of a sum over its rows; those two by two where they are paired.
  template <class T>
  void read_to_sum_over_rows(const T* x, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, E* to, std::int64_t to_row) {
    if constexpr (paired) {
      read_panel<A>(x, row, column, rows, columns, staged, to_row);
      if (rows % 2) std::fill_n(staged + rows * to_row, to_row, A(0));
      pair_rows(staged, to_row, (rows + 1) / 2, columns, to);
    } else {
      read_panel<A>(x, row, column, rows, columns, to, to_row);
    }
  }

  // The same as the factor of a sum over its columns.
  template <class T>
  void read_to_sum_over_columns(const T* x, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, E* to, std::int64_t to_row) {
    if constexpr (paired) read_pairs(x, row, column, rows, columns, to, to_row);
    else read_panel<A>(x, row, column, rows, columns, to, to_row);
  }

  template <class T>
  void begin(const Tensors& t, std::int64_t n, std::int64_t kv, std::int64_t first, std::int64_t count) {
    const View &k_view = t.key, &v_view = t.value;
    const T *k = k_view.at<const T>(n, kv, first), *v = v_view.at<const T>(n, kv, first);
    read_to_sum_over_columns(k, k_view.row, k_view.column, count, p.depth, keys, key_row);
    read_to_sum_over_columns(v, v_view.row, v_view.column, count, p.width, values, value_row);
    for (std::int64_t i = 0; paired && i < count; i += lanes)
      read_to_sum_over_rows(k + i * k_view.row, k_view.row, k_view.column, std::min(lanes, count - i), p.depth, key_columns + i / F::count * key_row, key_row);
    std::fill_n(d_keys, most_keys * key_row, A(0));
    std::fill_n(d_values, most_keys * value_row, A(0));
  }

  // Rows [row, row + rows) of a head.
  template <class T>
  void read_block(const Tensors& t, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, const A* statistics) {
    for (std::int64_t at = 0; at < rows; at += lanes)
      read_rows(at, std::min(lanes, rows - at), t.query.at<const T>(n, h, row + at), t.query, t.grad.at<const T>(n, h, row + at), t.grad,
                t.output.at<const T>(n, h, row + at), t.output, statistics + at);
  }

  // One panel of them: `at` is where it begins in the block.
  template <class T>
  void read_rows(std::int64_t at, std::int64_t rows, const T* q, const View& q_view, const T* grad, const View& grad_view, const T* out,
                 const View& out_view, const A* statistics) {
    E *to_queries = queries + at * key_terms, *to_grads = grads + at * value_terms;
    read_to_sum_over_rows(q, q_view.row, q_view.column, rows, p.depth, query_rows + at / F::count * key_row, key_row);
    read_to_sum_over_rows(grad, grad_view.row, grad_view.column, rows, p.width, grad_rows + at / F::count * value_row, value_row);
    read_to_sum_over_rows(q, q_view.column, q_view.row, p.depth, rows, to_queries, lanes);
    read_to_sum_over_rows(grad, grad_view.column, grad_view.row, p.width, rows, to_grads, lanes);
    const A* grads_of_panel = [&] {  // as numbers: staged just now
      if constexpr (paired) return staged;
      else return to_grads;
    }();
    read_panel<A>(out, out_view.column, out_view.row, p.width, rows, outputs, lanes);
    read_statistics<A>(statistics, rows, grads_of_panel, outputs, p.width, lanes, logsumexp + at, delta + at);
  }

  // Weights and d_scores of keys [key, key + count), at `offset` in the chunk, for one panel; and its part of d_queries. The d_scores go
  // to `all_scores` too, rows of S, where that is wanted.
  template <int wide>
  void differentiate(std::int64_t at, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, std::int64_t offset, std::int64_t key,
                     std::int64_t count, A* all_scores) {
    multiply_keys<F, A, wide>(keys + offset * key_row, key_row, count, queries + at * key_terms, key_terms, scores);
    multiply_keys<F, A, wide>(values + offset * value_row, value_row, count, grads + at * value_terms, value_terms, d_weights);
    const Vec<A> scale(static_cast<A>(p.scale * kLog2E));
    const bool biased = p.mask || (p.causal && key + count > row + 1);
    if (biased) read_bias<A, lanes>(p, n, h, row, rows, key, count, bias);
    E *weight = weights + at / F::count * block, *d_score = d_scores + at / F::count * block;
    for (std::int64_t k = 0; k < count; k += F::count) {
      Vec<A> probability[F::count][wide], change[F::count][wide];
      for (int j = 0; j < F::count; ++j) {
        if (k + j == count) {
          for (int v = 0; v < wide; ++v) change[j][v] = Vec<A>(A(0));
          break;
        }
        for (int v = 0; v < wide; ++v) {
          const std::int64_t i = (k + j) * lanes + v * kWidth<A>;
          const Vec<A> lse = load(logsumexp + at + v * kWidth<A>);
          probability[j][v] = biased ? madd<A>(load(scores + i), scale, load(bias + i) * static_cast<A>(kLog2E)) - lse : madd<A>(load(scores + i), scale, -lse);
        }
        exp2(probability[j]);
        for (int v = 0; v < wide; ++v) {
          const std::int64_t i = (k + j) * lanes + v * kWidth<A>;
          change[j][v] = probability[j][v] * (load(d_weights + i) - load(delta + at + v * kWidth<A>));
          if (all_scores != nullptr) store(d_weights + i, change[j][v]);
          store_factor(weight, i, probability[j][v]), store_factor(d_score, i, change[j][v]);
        }
      }
      if constexpr (paired)
        for (int v = 0; v < wide; ++v)
          make_pairs(change[0][v], change[1][v]).copy_to(d_score_pairs + k / 2 * lanes + v * kWidth<A>, stdx::element_aligned);
    }
    if (all_scores != nullptr) write_panel<A>(d_weights, lanes, count, rows, all_scores, 1, p.keys);
    const E* of_keys = paired ? d_score_pairs : d_score;
    multiply_values<F, A, wide>(key_columns + offset / F::count * key_row, key_row, p.depth, of_keys, (count + F::count - 1) / F::count, ones,
                                d_queries + at * key_row);
  }

  void differentiate(std::int64_t at, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, std::int64_t offset, std::int64_t key,
                     std::int64_t count, A* all_scores) {
    with_width<A>(rows, [&](auto wide) { differentiate<wide>(at, n, h, row, rows, offset, key, count, all_scores); });
  }

  // What `rows` rows of the block add to the gradients of `count` keys and values from `offset` on.
  void add_to_keys(std::int64_t rows, std::int64_t offset, std::int64_t count) {
    multiply_rows<F, A>(weights, panel_size, rows, grad_rows, count, p.width, d_values + offset * value_row, value_row);
    multiply_rows<F, A>(d_scores, panel_size, rows, query_rows, count, p.depth, d_keys + offset * key_row, key_row);
  }

  template <class T>
  void write_keys(const Tensors& t, std::int64_t n, std::int64_t kv, std::int64_t first, std::int64_t count) {
    const A scale = static_cast<A>(p.scale);
    for (std::int64_t i = 0; i < count * key_row; i += kWidth<A>) store(d_keys + i, load(d_keys + i) * scale);
    write_panel<A>(d_keys, key_row, count, p.depth, t.d_key.at<T>(n, kv, first), t.d_key.row, t.d_key.column);
    write_panel<A>(d_values, value_row, count, p.width, t.d_value.at<T>(n, kv, first), t.d_value.row, t.d_value.column);
  }

  // Number i of a panel of factors.
  FASTGEN_INLINE static void store_factor(E* panel, std::int64_t i, Vec<A> x) {
    if constexpr (paired) store(reinterpret_cast<BFloat16*>(panel) + i, x);
    else store(panel + i, x);
  }
};

// d_query_parts [chunks, N, H, L, E] where there are several chunks, d_scores where wanted.
template <class T, class C>
void backward(const Problem& p, const Chunks& chunks, const Tensors& t, const opmath_t<T>* logsumexp, opmath_t<T>* d_query_parts,
              opmath_t<T>* d_scores) {
  using A = opmath_t<T>;
  constexpr std::int64_t lanes = C::lanes;
  const A scale = static_cast<A>(p.scale);
  const std::int64_t most_rows = C::most_rows(p);
  parallel(p.n * p.kv_heads * chunks.count, p.work(), [&](std::int64_t begin, std::int64_t end) {
    C chunk(p, chunks);
    [[maybe_unused]] const Unit<typename C::F> unit;
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t part = item % chunks.count, n = item / chunks.count / p.kv_heads, kv = item / chunks.count % p.kv_heads;
      const std::int64_t first = part * chunks.keys, count = std::min(chunks.keys, p.keys - first);
      chunk.template begin<T>(t, n, kv, first, count);
      for (std::int64_t h = kv * p.group(); h < (kv + 1) * p.group(); ++h)
        for (std::int64_t row = 0; row < p.rows; row += most_rows) {
          const std::int64_t rows = std::min(most_rows, p.rows - row);
          const auto each_panel = [&](auto&& work) {
            for (std::int64_t at = 0; at < rows; at += lanes) work(at, row + at, std::min(lanes, rows - at));
          };
          std::fill_n(chunk.d_queries, round_up(rows, lanes) * chunk.key_row, A(0));
          const std::int64_t visible = std::min(p.visible(row + rows) - first, count);
          if (visible > 0) chunk.template read_block<T>(t, n, h, row, rows, logsumexp + (n * p.heads + h) * p.rows + row);
          for (std::int64_t k = 0; k < visible; k += C::block) {
            const std::int64_t keys = std::min(C::block, count - k);  // whole: what pads a block of weights is not zero
            each_panel([&](std::int64_t at, std::int64_t r, std::int64_t panel_rows) {
              A* all_scores = d_scores == nullptr ? nullptr : d_scores + ((n * p.heads + h) * p.rows + r) * p.keys + first + k;
              chunk.differentiate(at, n, h, r, panel_rows, k, first + k, keys, all_scores);
            });
            chunk.add_to_keys(rows, k, keys);
          }
          each_panel([&](std::int64_t at, std::int64_t r, std::int64_t panel_rows) {
            A* from = chunk.d_queries + at * chunk.key_row;
            for (std::int64_t i = 0; i < p.depth * lanes; i += kWidth<A>) store(from + i, load(from + i) * scale);
            if (d_query_parts == nullptr) {
              write_panel<A>(from, lanes, p.depth, panel_rows, t.d_query.at<T>(n, h, r), t.d_query.column, t.d_query.row);
            } else {
              A* to = d_query_parts + (((part * p.n + n) * p.heads + h) * p.rows + r) * p.depth;
              write_panel<A>(from, lanes, p.depth, panel_rows, to, 1, p.depth);
            }
          });
        }
      chunk.template write_keys<T>(t, n, kv, first, count);
    }
  });
}

// The parts of d_query added in the order of the chunks.
template <class T>
void add_parts(const Problem& p, std::int64_t parts, const opmath_t<T>* from, const View& d_query) {
  using A = opmath_t<T>;
  const std::int64_t rows = p.n * p.heads * p.rows, size = rows * p.depth;
  parallel(rows, parts * size, [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> sum(round_up(p.depth, kWidth<A>));
    for (std::int64_t i = begin; i < end; ++i) {
      for_vectors<A>(p.depth, [&](std::int64_t e, auto at) {
        Vec<A> total = at.load(from + i * p.depth + e);
        for (std::int64_t part = 1; part < parts; ++part) total += at.load(from + part * size + i * p.depth + e);
        store(sum.data() + e, total);
      });
      T* to = d_query.at<T>(i / p.rows / p.heads, i / p.rows % p.heads, i % p.rows);
      write_panel<A>(sum.data(), 0, 1, p.depth, to, 0, d_query.column);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                         const Tensor& value, const Tensor& output, const Tensor& logsumexp,
                                                         OptionalTensor attn_mask, bool is_causal, double scale, bool wants_scores) {
  const Problem p = make_problem("attention_bwd", query, key, value, attn_mask, is_causal, scale);
  const ScalarType dtype = query.scalar_type(), opmath = opmath_type(dtype);
  const std::vector<std::int64_t> sizes{p.n, p.heads, p.rows, p.width}, statistics{p.n, p.heads, p.rows};
  FASTGEN_CHECK(sizes_of(grad_output) == sizes && grad_output.scalar_type() == dtype, "attention_bwd: grad_output must be [N, H, L, Ev] in the dtype of query");
  FASTGEN_CHECK(sizes_of(output) == sizes && output.scalar_type() == dtype, "attention_bwd: output must be [N, H, L, Ev] in the dtype of query");
  FASTGEN_CHECK(sizes_of(logsumexp) == statistics && logsumexp.scalar_type() == opmath, "attention_bwd: logsumexp must be [N, H, L] in the dtype of the statistics");
  Tensor d_query = empty_in_order_of(query, sizes_of(query)), d_key = empty_in_order_of(key, sizes_of(key));
  Tensor d_value = empty_in_order_of(value, sizes_of(value));
  Tensor d_scores = empty_contiguous(wants_scores ? std::vector{p.n, p.heads, p.rows, p.keys} : std::vector<std::int64_t>{0}, opmath);
  const Tensor dense_statistics = as_dense(logsumexp, false);
  dispatch_dtype("attention_bwd", dtype, [&]<class T>() {
    using A = opmath_t<T>;
    auto* scores = wants_scores ? static_cast<A*>(d_scores.mutable_data_ptr()) : nullptr;
    if (wants_scores) std::fill_n(scores, d_scores.numel(), A(0));  // what a causal row does not see is not visited
    if (p.keys == 0 || p.rows == 0 || p.heads == 0) {
      for (Tensor* t : {&d_query, &d_key, &d_value}) std::memset(t->mutable_data_ptr(), 0, t->numel() * sizeof(T));
      return;
    }
    const Tensors tensors{View(grad_output), View(query), View(key), View(value), View(output), View(d_query), View(d_key), View(d_value)};
    const auto run_by = [&]<class C>() {
      const Chunks chunks = Chunks::of(p, C::items, C::block);
      const bool several = chunks.count > 1;
      const Scratch<A> parts(several ? chunks.count * p.n * p.heads * p.rows * p.depth : 0);
      backward<T, C>(p, chunks, tensors, static_cast<const A*>(dense_statistics.data_ptr()), several ? parts.get() : nullptr, scores);
      if (several) add_parts<T>(p, chunks.count, parts.get(), tensors.d_query);
    };
    // torch computes heads whose values have another width in float32, and rounding what tiles multiply would be more than twice its error.
    if constexpr (matrix_tiles::kAvailable && std::is_same_v<T, BFloat16>)
      if (p.depth == p.width) return run_by.template operator()<TiledChunk>();
    if constexpr (kHasPairs && std::is_same_v<T, BFloat16>)
      if (pairs_are_fast()) return run_by.template operator()<Chunk<Pairs, A>>();
    run_by.template operator()<Chunk<Singles<A>, A>>();
  });
  return {d_query, d_key, d_value, d_scores};
}

}  // namespace
}  // namespace fastgen::attention

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("attention_bwd", TORCH_BOX(&fastgen::attention::attention_bwd)); }
