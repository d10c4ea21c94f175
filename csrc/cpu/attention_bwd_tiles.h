// A chunk of the backward on a matrix unit (_matrix_products.h), for bfloat16. All five products are of tiles of pairs, sums in fp32.
//
// Scores and their gradients come with rows in the lanes of a panel, as in the forward, and between the products are fp32. Weights and
// d_scores are then rounded to bfloat16, as torch's are: along the rows as they lie, which is the left factor of dV = P^T dO and
// dK = dS^T Q, and d_scores once more as pairs of keys, the right factor of dQ^T = K^T dS^T. Left factors, gradients of keys and values, and
// what is summed over rows lie in whole tiles.
#pragma once

#include "_matrix_products.h"
#include "attention_bwd.h"

namespace fastgen::attention {

#if FASTGEN_HAS_MATRIX_TILES

struct TiledChunk {
  using F = TiledPairs;
  using A = float;
  using E = std::uint32_t;
  static constexpr std::int64_t lanes = F::lanes, tile = F::tile, words = F::words, pairs = F::deep, deep = F::deep * F::count;
  static constexpr std::int64_t block = 64;  // keys: two blocks of a panel's scores are 24 KB of a first-level cache of 48
  static constexpr std::int64_t items = 32;  // each reads all rows anew, and writes a part of dQ
  static constexpr std::int64_t most_panels = 6;  // of a block of rows, so many that they end in a whole tile of pairs

  Arena arena;
  const Problem& p;
  std::int64_t key_row, value_row, key_deep, value_deep, row_tiles, most_keys;  // key_deep, value_deep: tiles along the depth, the width
  E *keys, *values, *key_columns;               // tiles [keys][depth], [keys][width], [keys][depth] for a sum over keys
  A *d_keys, *d_values;                         // tiles [keys][depth], [keys][width]
  E *queries, *grads, *query_rows, *grad_rows;  // panels [depth or width][lanes]; tiles [rows][depth or width] for a sum over rows
  E *weights, *d_scores, *d_score_pairs;        // tiles [keys][rows]; of one panel [keys / 2][lanes]
  A *d_queries, *scores, *d_weights, *bias;     // panels [E][lanes]; of one panel [keys][lanes]
  A *logsumexp, *delta, *outputs, *staged, *factor;

  TiledChunk(const Problem& problem, const Chunks& chunks)
      : p(problem),
        key_row(round_up(p.depth, tile)),
        value_row(round_up(p.width, tile)),
        key_deep(round_up(p.depth, deep) / deep),
        value_deep(round_up(p.width, deep) / deep),
        row_tiles(round_up(most_rows(p), deep) / deep),
        most_keys(chunks.keys) {
    const std::int64_t rows = most_rows(p), key_tiles = most_keys / tile;
    keys = arena.take<E>(key_tiles * key_deep * words), values = arena.take<E>(key_tiles * value_deep * words);
    key_columns = arena.take<E>(most_keys * key_row / F::count);
    d_keys = arena.take<A>(most_keys * key_row), d_values = arena.take<A>(most_keys * value_row);
    queries = arena.take<E>(rows * key_deep * pairs), grads = arena.take<E>(rows * value_deep * pairs);
    query_rows = arena.take<E>(row_tiles * pairs * key_row), grad_rows = arena.take<E>(row_tiles * pairs * value_row);
    for (E** at : {&weights, &d_scores}) *at = arena.take<E>(block / tile * row_tiles * words);
    d_score_pairs = arena.take<E>(block / F::count * lanes);
    d_queries = arena.take<A>(rows * key_row);
    for (A** at : {&scores, &d_weights, &bias}) *at = arena.take<A>(block * lanes);
    logsumexp = arena.take<A>(rows), delta = arena.take<A>(rows), factor = arena.take<A>(tile);
    for (A** at : {&outputs, &staged}) *at = arena.take<A>(p.width * lanes);
    std::fill_n(factor, tile, static_cast<A>(p.scale));
  }
  TiledChunk(const TiledChunk&) = delete;

  static std::int64_t most_rows(const Problem& p) { return std::min(most_panels * lanes, round_up(p.rows, lanes)); }

  // x[rows][columns] in tiles of `tile` rows by `deep` columns, those of one row beside each other.
  template <class T>
  static void read_left(const T* x, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, E* to) {
    for (std::int64_t i = 0; i < rows; i += tile)
      for (std::int64_t j = 0; j < columns; j += deep, to += words)
        read_tile<false>(x + i * row + j * column, row, column, rows - i, columns - j, to, tile);
  }

  template <class T>
  void begin(const Tensors& t, std::int64_t n, std::int64_t kv, std::int64_t first, std::int64_t count) {
    const T *k = t.key.at<const T>(n, kv, first), *v = t.value.at<const T>(n, kv, first);
    read_left(k, t.key.row, t.key.column, count, p.depth, keys);
    read_left(v, t.value.row, t.value.column, count, p.width, values);
    E* to = key_columns;
    for (std::int64_t i = 0; i < count; i += deep)
      for (std::int64_t e = 0; e < p.depth; e += tile, to += words)
        read_tile<false>(k + i * t.key.row + e * t.key.column, t.key.column, t.key.row, p.depth - e, count - i, to, tile);
    std::fill_n(d_keys, most_keys * key_row, A(0));
    std::fill_n(d_values, most_keys * value_row, A(0));
  }

  // x[rows][columns] as the right factor of a sum over its rows, in tiles.
  template <class T>
  static void read_to_sum_over_rows(const T* x, const View& view, std::int64_t rows, std::int64_t columns, E* to) {
    for (std::int64_t i = 0; i < rows; i += deep)
      for (std::int64_t j = 0; j < columns; j += tile, to += words)
        read_tile<true>(x + i * view.row + j * view.column, view.column, view.row, columns - j, rows - i, to, tile);
  }
  // As that of a sum over its columns, in panels of `terms` tiles.
  template <class T>
  static void read_to_sum_over_columns(const T* x, const View& view, std::int64_t rows, std::int64_t columns, std::int64_t terms, E* to) {
    for (std::int64_t i = 0; i < rows; i += tile)
      for (std::int64_t e = 0; e < terms; ++e)
        read_tile<true>(x + i * view.row + e * deep * view.column, view.row, view.column, rows - i, columns - e * deep,
                        to + ((i / lanes * terms + e) * pairs) * lanes + i % lanes, lanes);
  }

  // Rows [row, row + rows) of a head.
  template <class T>
  void read_block(const Tensors& t, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, const A* statistics) {
    const T *q = t.query.at<const T>(n, h, row), *grad = t.grad.at<const T>(n, h, row), *out = t.output.at<const T>(n, h, row);
    read_to_sum_over_rows(q, t.query, rows, p.depth, query_rows);
    read_to_sum_over_rows(grad, t.grad, rows, p.width, grad_rows);
    read_to_sum_over_columns(q, t.query, rows, p.depth, key_deep, queries);
    read_to_sum_over_columns(grad, t.grad, rows, p.width, value_deep, grads);
    for (std::int64_t at = 0; at < rows; at += lanes) {
      const std::int64_t of_panel = std::min(lanes, rows - at);
      read_panel<A>(grad + at * t.grad.row, t.grad.column, t.grad.row, p.width, of_panel, staged, lanes);
      read_panel<A>(out + at * t.output.row, t.output.column, t.output.row, p.width, of_panel, outputs, lanes);
      read_statistics<A>(statistics + at, of_panel, staged, outputs, p.width, lanes, logsumexp + at, delta + at);
    }
  }

  void differentiate(std::int64_t at, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, std::int64_t offset, std::int64_t key,
                     std::int64_t count, A* all_scores) {
    with_vectors<F, A>(rows, [&](auto wide) { differentiate<wide>(at, n, h, row, rows, offset, key, count, all_scores); });
  }

  // As that of Chunk in attention_bwd.cpp.
  template <int wide>
  void differentiate(std::int64_t at, std::int64_t n, std::int64_t h, std::int64_t row, std::int64_t rows, std::int64_t offset, std::int64_t key,
                     std::int64_t count, A* all_scores) {
    constexpr int across = wide * kWidth<A> / F::tile, w = kWidth<A>;
    const std::int64_t tall = round_up(count, tile) / tile;
    multiply_keys_by_tiles<across>(keys + offset / tile * key_deep * words, tall, key_deep, queries + at * key_deep * pairs, scores);
    multiply_keys_by_tiles<across>(values + offset / tile * value_deep * words, tall, value_deep, grads + at * value_deep * pairs, d_weights);
    if (rows % tile != 0) {  // a key that is not finite must not get into what pads the panel
      for (std::int64_t k = 0; k < count; ++k)
        for (A* of : {scores, d_weights}) std::fill_n(of + k * lanes + rows, round_up(rows, tile) - rows, A(0));
    }
    const bool biased = p.mask || (p.causal && key + count > row + 1);
    if (biased) {
      read_bias<A, lanes>(p, n, h, row, rows, key, count, bias);
      for (std::int64_t i = 0; i < count * lanes; i += w) store(bias + i, load(bias + i) * static_cast<A>(kLog2E));
    }
    const Vec<A> scale(static_cast<A>(p.scale * kLog2E));
    Vec<A> sum[wide], mean[wide];
    BFloat16 *weight[wide], *d_score[wide];  // where each vector of the first key lies
    for (int v = 0; v < wide; ++v) {
      const std::int64_t lane = at + v * w, place = lane / deep * words * F::count + lane % deep;
      sum[v] = -load(logsumexp + lane), mean[v] = load(delta + lane);
      weight[v] = reinterpret_cast<BFloat16*>(weights) + place, d_score[v] = reinterpret_cast<BFloat16*>(d_scores) + place;
    }
    for (std::int64_t k = 0; k < count; k += 2) {
      if (k % 16 == 8) stay_awake<F>();
      Vec<A> change[2][wide];
      for (int j = 0; j < 2; ++j) {
        if (k + j == count) {
          for (int v = 0; v < wide; ++v) change[j][v] = Vec<A>(A(0));
          break;
        }
        Vec<A> probability[wide];
        const std::int64_t first = (k + j) * lanes, place = ((k + j) / tile * row_tiles * tile + (k + j) % tile) * deep;
        for (int v = 0; v < wide; ++v) {
          if (biased) probability[v] = madd<A>(load(scores + first + v * w), scale, load(bias + first + v * w)) + sum[v];
          else probability[v] = madd<A>(load(scores + first + v * w), scale, sum[v]);
        }
        short_exp2<A>(probability);
        for (int v = 0; v < wide; ++v) {
          change[j][v] = probability[v] * (load(d_weights + first + v * w) - mean[v]);
          if (all_scores != nullptr) store(d_weights + first + v * w, change[j][v]);
          store(weight[v] + place, probability[v]), store(d_score[v] + place, change[j][v]);
        }
      }
      for (int v = 0; v < wide; ++v) make_pairs(change[0][v], change[1][v]).copy_to(d_score_pairs + k / 2 * lanes + v * w, stdx::element_aligned);
    }
    if (all_scores != nullptr) write_panel<A>(d_weights, lanes, count, rows, all_scores, 1, p.keys);
    const std::int64_t terms = (count + 1) / 2, whole = round_up(count, deep) / 2;
    std::fill_n(d_score_pairs + terms * lanes, (whole - terms) * lanes, E(0));
    multiply_values_by_tiles<across>(key_columns + offset / F::count * key_row, key_row / tile, whole / pairs, d_score_pairs, false,
                                     d_queries + at * key_row);
  }

  // What `rows` rows of the block add to the gradients of `count` keys and values from `offset` on.
  void add_to_keys(std::int64_t rows, std::int64_t offset, std::int64_t count) {
    const std::int64_t tall = round_up(count, tile) / tile, whole = round_up(rows, tile);
    if (whole % deep != 0)
      for (std::int64_t k = 0; k < tall * tile; ++k)
        for (E* of : {weights, d_scores})
          std::fill_n(of + (k / tile * row_tiles + whole / deep) * words + k % tile * pairs + pairs / 2, pairs / 2, E(0));
    const std::int64_t terms = round_up(rows, deep) / deep, step = row_tiles * words;
    multiply_rows_by_tiles(weights, step, tall, terms, grad_rows, value_row / tile, d_values + offset * value_row);
    multiply_rows_by_tiles(d_scores, step, tall, terms, query_rows, key_row / tile, d_keys + offset * key_row);
  }

  template <class T>
  void write_keys(const Tensors& t, std::int64_t n, std::int64_t kv, std::int64_t first, std::int64_t count) {
    const auto write = [&](const A* from, std::int64_t columns, T* to, const View& view, const A* by) {
      for (std::int64_t i = 0; i < count; i += tile)
        for (std::int64_t j = 0; j < columns; j += tile, from += words)
          write_panel<A>(from, tile, std::min(tile, count - i), std::min(tile, columns - j), to + i * view.row + j * view.column, view.row,
                         view.column, by);
    };
    write(d_keys, p.depth, t.d_key.at<T>(n, kv, first), t.d_key, factor);
    write(d_values, p.width, t.d_value.at<T>(n, kv, first), t.d_value, nullptr);
  }
};

#else

struct TiledChunk;

#endif

}  // namespace fastgen::attention
