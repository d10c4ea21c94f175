// A convolution in bfloat16 by the tiles of a matrix unit (common/simd/matrix_tiles.h): every product of the definition, sums in fp32.
//
//   output = (conv(act(input * input_scale + input_shift)) + bias + embedding + residual) * output_scale
//
// Rows of pixels are taken in groups that stay in the second-level cache, each group in two steps that all threads share.
//
// 1. Pixels. A thread owns rows of a block of kChunk channels: read once, the affine map and the activation applied in fp32, rounded to
//    bfloat16, written once as [blocks][positions][kChunk]. A row is a zero and its pixels, between two images lies a row of zeros: what
//    stands to the right of a row is the zero of the next one. So what a tap reads for sixteen neighbouring positions is 1 KB in one
//    piece, at the same distance from them wherever they are: a tile.
// 2. Outputs. A thread owns pairs of tiles and of panels of kPanel outputs: four tiles of sums run over all blocks and taps while the
//    weights, packed as they are read, pass by once. Four loads for four products, each of which takes as long as two loads.
//    Then bias, embedding, residual and scale in fp32, and one store.
//
// Tiles are sixteen pixels of a row, or sixteen positions wherever rows end, whichever are fewer. The order of every sum is that of the
// weights: the bits are the same on any number of threads.
//
// After upsampling by two each phase of the outputs sees 2x2 sums of the weights (_convolution.h), of its own.
#pragma once

#include "_convolution_outputs.h"
#include "_convolution_pack.h"

namespace fastgen::convolution {

// Of the pixels of a group. Half of a second-level cache of 2 MB; beside it pass the weights.
inline constexpr std::int64_t kPixelBytes = 1 << 20;
inline constexpr std::int64_t kTile = matrix_tiles::kRows;  // positions of a tile
inline constexpr std::int64_t kTileSize = kTile * kChunk;   // elements of a tile of pixels or of weights

// side x side taps for each of scale x scale phases of the outputs of a kernel.
template <int k, int s>
struct Taps {
  static constexpr int kernel = k, scale = s, halo = k / 2, side = s == 2 ? 2 : k, count = side * side, phases = s * s;
};

// Calls f with the taps that packed weights of so many have: f.template operator()<Taps<kernel, scale>>().
template <int scale, class F>
inline auto dispatch_taps(std::int64_t count, F&& f) {
  if constexpr (scale == 1)
    if (count == 1) return f.template operator()<Taps<1, 1>>();
  return f.template operator()<Taps<3, scale>>();
}

// ---- weights -----------------------------------------------------------------------------------------------------------------

// [phases][panels][blocks][taps][kTile pairs of channels][kPanel outputs][2], zeros beyond the last channel and output. A thread owns
// panels. Sums of weights are taken in fp64 and rounded once.
template <class K, class T>
void pack_direct(const Tensor& weight, BFloat16* packed) {
  const std::int64_t outputs = weight.size(0), channels = weight.size(1), panels = ceil_div(outputs, kPanel), blocks = ceil_div(channels, kChunk);
  const std::int64_t stride[] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const T* const w = static_cast<const T*>(weight.data_ptr());
  const auto tap = [&](const T* of, int phase_y, int phase_x, int y, int x) {
    if constexpr (K::scale == 1) return static_cast<double>(widen(of[y * stride[2] + x * stride[3]]));
    double sum = 0;  // phase 0 sees (w0, w1 + w2), phase 1 (w0 + w1, w2)
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        if ((i + 1 - phase_y) / 2 == y && (j + 1 - phase_x) / 2 == x) sum += static_cast<double>(widen(of[i * stride[2] + j * stride[3]]));
    return sum;
  };
  parallel(K::phases * panels, weight.numel() * K::phases, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const int phase = static_cast<int>(i / panels);
      const std::int64_t first = i % panels * kPanel;
      BFloat16* to = packed + i * blocks * K::count * kTileSize;
      for (std::int64_t block = 0; block < blocks; ++block)
        for (int t = 0; t < K::count; ++t)
          for (std::int64_t pair = 0; pair < kTile; ++pair)
            for (std::int64_t o = 0; o < kPanel; ++o)
              for (std::int64_t half = 0; half < 2; ++half) {
                const std::int64_t k = first + o, c = block * kChunk + 2 * pair + half;
                const bool there = k < outputs && c < channels;
                const T* const of = w + (there ? k * stride[0] + c * stride[1] : 0);
                const double value = there ? tap(of, phase / K::scale, phase % K::scale, t / K::side, t % K::side) : 0;
                *to++ = narrow<BFloat16>(static_cast<float>(value));
              }
    }
  });
}

// The op: of weights [K, C, kernel, kernel], bfloat16 [phases, panels, blocks, taps, 16, 32].
template <int scale>
Tensor pack_weight_direct(const char* op, const Tensor& weight) {
  check_floating(op, "weight", weight);
  const std::int64_t kernel = weight.dim() == 4 ? weight.size(2) : 0;
  FASTGEN_CHECK(weight.dim() == 4 && weight.size(3) == kernel && (kernel == 3 || (kernel == 1 && scale == 1)), op,
                ": weight must be [K, C, 3, 3]", scale == 1 ? " or [K, C, 1, 1]" : "");
  FASTGEN_CHECK(weight.numel() > 0, op, ": weight must not be empty");
  return dispatch_taps<scale>(kernel * kernel, [&]<class K>() {
    Tensor packed = empty_contiguous({K::phases, ceil_div(weight.size(0), kPanel), ceil_div(weight.size(1), kChunk), K::count, kTile, kChunk},
                                     ScalarType::BFloat16);
    ask_for_huge_pages(packed.mutable_data_ptr(), packed.numel() * sizeof(BFloat16));
    dispatch_dtype(op, weight.scalar_type(),
                   [&]<class T>() { pack_direct<K, T>(weight, static_cast<BFloat16*>(packed.mutable_data_ptr())); });
    return packed;
  });
}

// ---- positions ---------------------------------------------------------------------------------------------------------------

// Rows of outputs of all samples, `period` apart, in groups; of each `row` positions, the first ones its pixels.
template <class K>
struct Positions {
  std::int64_t height, width, row, period, rows, rows_of_group, blocks, plane;

  explicit Positions(const Problem& p)
      : height(p.height), width(p.width), row(width + K::halo), period(height + K::halo), rows(p.n * period - K::halo),
        blocks(ceil_div(p.channels, kChunk)) {
    const std::int64_t bytes = rows * row * blocks * kChunk * static_cast<std::int64_t>(sizeof(BFloat16));
    rows_of_group = ceil_div(rows, std::min(ceil_div(bytes, kPixelBytes), rows));
    plane = ((rows_of_group + 2 * K::halo) * row + 2 * K::halo + kTile) * kChunk;  // of a block; tiles may end past the last row
  }

  bool outside(std::int64_t r) const { return r < 0 || r >= rows || r % period == height; }

  // Where the tiles of the rows from `first` on begin. Where channels lie innermost those of two rows alternate, and a pair of them reads
  // four rows of pixels, not six; where pixels do, a pair writes a cache line of each channel.
  std::vector<std::int64_t> tiles(std::int64_t first, std::int64_t count, bool channels_last) const {
    std::vector<std::int64_t> inside, of_rows, of_all;
    for (std::int64_t r = 0; r < count; ++r)
      if (!outside(first + r)) inside.push_back(r * row);
    const std::size_t beside = channels_last ? 2 : 1;
    for (std::size_t r = 0; r < inside.size(); r += beside)
      for (std::int64_t x = 0; x < width; x += kTile)
        for (std::size_t k = r; k < std::min(r + beside, inside.size()); ++k) of_rows.push_back(inside[k] + x);
    for (std::int64_t at = 0; at < count * row; at += kTile) of_all.push_back(at);
    return of_rows.size() <= of_all.size() ? of_rows : of_all;
  }

  // Calls f(sample, y, x, i, count) with the runs of pixels among `length` positions, the i-th of which begins one.
  template <class F>
  void for_runs(std::int64_t first, std::int64_t at, std::int64_t length, const F& f) const {
    for (std::int64_t i = 0; i < length;) {
      const std::int64_t r = first + (at + i) / row, x = (at + i) % row, count = std::min(length - i, row - x);
      if (!outside(r) && x < width) f(r / period, r % period, x, i, std::min(count, width - x));
      i += count;
    }
  }
};

// Pixels in a row among the positions of a pair of tiles, and where what becomes of them goes in the image.
struct Run {
  std::int64_t sample, position, pixels, to, beside;
};
// Two tiles, or the last alone.
struct Pair {
  std::int64_t tiles, at[2];
  std::vector<Run> runs;
};

template <class K>
std::vector<Pair> make_pairs_of_tiles(const Positions<K>& g, const Finish<BFloat16>& finish, std::int64_t first, std::int64_t rows) {
  const std::vector<std::int64_t> tiles = g.tiles(first, rows, finish.p.channels_last);
  std::vector<Pair> pairs;
  for (std::size_t t = 0; t < tiles.size(); t += 2) {
    const bool two = t + 1 < tiles.size(), joined = two && tiles[t + 1] == tiles[t] + kTile;
    Pair pair{two ? 2 : 1, {tiles[t], tiles[two ? t + 1 : t]}, {}};
    for (std::int64_t j = 0; j < (joined ? 1 : pair.tiles); ++j)
      g.for_runs(first, pair.at[j], joined ? 2 * kTile : kTile, [&](std::int64_t n, std::int64_t y, std::int64_t x, std::int64_t i, std::int64_t count) {
        const auto offset = [&](const auto& image) { return n * image.n + y * K::scale * image.h + x * K::scale * image.w; };
        pair.runs.push_back({n, j * kTile + i, count, offset(finish.output), finish.residual ? offset(*finish.residual) : 0});
      });
    pairs.push_back(std::move(pair));
  }
  return pairs;
}

template <class K, bool kSilu>
void make_pixels(const Problem& p, const Positions<K>& g, const Image<const BFloat16>& x, std::int64_t first, std::int64_t rows, BFloat16* pixels) {
  const std::int64_t lines = rows + 2 * K::halo;
  const auto clear = [](BFloat16* at, std::int64_t positions) { std::memset(at, 0, positions * kChunk * sizeof(BFloat16)); };
  parallel(g.blocks * lines, g.blocks * lines * g.row * kChunk, [&](std::int64_t begin, std::int64_t end) {
    Source<BFloat16, kSilu> source(p, x);
    std::int64_t taken = -1;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t block = i / lines, line = i % lines, r = first + line - K::halo, c = block * kChunk;
      BFloat16* const out = pixels + block * g.plane + line * g.row * kChunk;
      if (line == lines - 1) clear(out + g.row * kChunk, K::halo);
      if (g.outside(r)) {
        clear(out, g.row);
        continue;
      }
      const std::int64_t sample = r / g.period, wanted = sample * g.blocks + block;
      if (wanted != taken) source.take_channels(sample, c, std::min(kChunk, p.channels - c)), taken = wanted;
      clear(out, K::halo);
      source.read_row(r % g.period, out + K::halo * kChunk);
    }
  });
}

// ---- outputs -----------------------------------------------------------------------------------------------------------------

// bias + embedding of `count` outputs of every sample: [N][kChunk].
inline void take_added(const Problem& p, std::int64_t first, std::int64_t count, float* added) {
  float bias[kChunk];
  p.bias.read(0, first, count, 0.0f, bias);
  for (std::int64_t n = 0; n < p.n; ++n, added += kChunk) {
    p.embedding.read(n, first, count, 0.0f, added);
    for (std::int64_t c = 0; c < count; ++c) added[c] += bias[c];
  }
}

// `tall` tiles of pixels by `wide` panels of weights. Tiles 0 to 3 are sums, 4 and 5 pixels, 6 and 7 weights. After each step, while the
// matrix unit works, beside().
template <class K, int tall, int wide, class F>
void multiply_tiles(const Positions<K>& g, const BFloat16* above, const BFloat16* below, const BFloat16* weights, std::int64_t panel,
                    float* sums, const F& beside) {
  namespace mt = matrix_tiles;
  mt::zero<0>(), mt::zero<1>(), mt::zero<2>(), mt::zero<3>();
  constexpr std::int64_t bytes = kChunk * sizeof(BFloat16), wide_bytes = kChunk * sizeof(float);
  for (std::int64_t block = 0; block < g.blocks; ++block, above += g.plane, below += g.plane)
    for (int y = 0; y < K::side; ++y)
      for (int x = 0; x < K::side; ++x, weights += kTileSize) {
        const std::int64_t at = (y * g.row + x) * kChunk;
        mt::load<4>(above + at, bytes);
        mt::load<6>(weights, bytes);
        mt::multiply<0, 4, 6>();
        if constexpr (wide == 2) mt::load<7>(weights + panel, bytes), mt::multiply<1, 4, 7>();
        if constexpr (tall == 2) mt::load<5>(below + at, bytes), mt::multiply<2, 5, 6>();
        if constexpr (tall == 2 && wide == 2) mt::multiply<3, 5, 7>();
        beside();
      }
  mt::store<0>(sums, wide_bytes);
  if constexpr (wide == 2) mt::store<1>(sums + kPanel, wide_bytes);
  if constexpr (tall == 2) mt::store<2>(sums + kTile * kChunk, wide_bytes);
  if constexpr (tall == 2 && wide == 2) mt::store<3>(sums + kTile * kChunk + kPanel, wide_bytes);
}

// The last step of the sums of a pair of tiles and kChunk outputs, one row of phases: from sums to lines of the image, which are a pixel's
// channels or a channel's pixels. In small pieces, of which multiply_tiles does one after the other beside the next sums.
template <class K>
class Ending {
  static constexpr int scale = K::scale;

 public:
  alignas(64) float sums[scale][2 * kTile][kChunk];  // [phase of x][position][output]

  explicit Ending(const Finish<BFloat16>& finish) : finish_(finish), last_(finish.p.channels_last) {}

  // `added`: [N][kChunk], of `count` outputs from `first` on.
  void begin(const Pair& pair, int phase_y, std::int64_t first, std::int64_t count, const float* added) {
    const Image<BFloat16>& output = finish_.output;
    const Image<const BFloat16>* const residual = finish_.residual;
    run_ = pair.runs.data(), end_ = run_ + pair.runs.size(), line_ = 0, turned_squares_ = 0;
    squares_ = last_ ? 0 : pair.tiles * kSquares, count_ = count, added_ = added;
    to_ = output.at(0, first, phase_y, 0), to_step_ = last_ ? output.w : output.c;
    if (residual) beside_ = residual->at(0, first, phase_y, 0), beside_step_ = last_ ? residual->w : residual->c;
    pieces = squares_;
    for (const Run& run : pair.runs) {
      const std::int64_t lines = lines_of(run);
      pieces += lines;
      for (std::int64_t l = 0; l < lines; ++l) prefetch_to_write(to_ + run.to + l * to_step_);
      for (std::int64_t l = 0; residual && l < lines; ++l) prefetch(beside_ + run.beside + l * beside_step_);
    }
  }

  // The next of so many pieces, if one is left.
  std::int64_t pieces = 0;
  FASTGEN_INLINE bool step() {
    if (turned_squares_ < squares_) return turn(turned_squares_++), true;
    if (run_ == end_) return false;
    put(*run_, line_);
    if (++line_ == lines_of(*run_)) ++run_, line_ = 0;
    return true;
  }

 private:
  static constexpr std::int64_t kSquares = scale * (kTile / kWidthF) * (kChunk / kWidthF);  // of a tile

  FASTGEN_INLINE std::int64_t lines_of(const Run& run) const { return last_ ? run.pixels * scale : count_; }

  FASTGEN_INLINE void put(const Run& run, std::int64_t line) const {
    BFloat16* const to = to_ + run.to + line * to_step_;
    const BFloat16* const beside = finish_.residual ? beside_ + run.beside + line * beside_step_ : nullptr;
    const float* const values = last_ ? sums[line % scale][run.position + line / scale] : turned_[line] + run.position * scale;
    const float* const added = added_ + run.sample * kChunk;
    for_vectors<float>(last_ ? count_ : run.pixels * scale, [&](std::int64_t e, auto part) {
      finish_.put(part, load(values + e), last_ ? load(added + e) : VecF(added[line]), to + e, beside ? beside + e : nullptr);
    });
  }

  // A square of sums turned over, pixels innermost, the phases of x woven together.
  void turn(std::int64_t index) {
    constexpr std::int64_t across = kChunk / kWidthF;
    const std::int64_t phase = index % scale, c = index / scale % across * kWidthF, i = index / scale / across * kWidthF;
    VecF square[kWidthF];
    for (std::int64_t k = 0; k < kWidthF; ++k) square[k] = load(sums[phase][i + k] + c);
    transpose(square);
    for (std::int64_t k = 0; k < kWidthF; ++k) {
      if constexpr (scale == 1) store(turned_[c + k] + i, square[k]);
      else for (std::int64_t l = 0; l < kWidthF; ++l) turned_[c + k][(i + l) * scale + phase] = square[k][l];
    }
  }

  const Finish<BFloat16>& finish_;
  const bool last_;
  const Run *run_ = nullptr, *end_ = nullptr;
  const float* added_ = nullptr;
  BFloat16* to_ = nullptr;
  const BFloat16* beside_ = nullptr;
  std::int64_t line_ = 0, squares_ = 0, turned_squares_ = 0, count_ = 0, to_step_ = 0, beside_step_ = 0;
  alignas(64) float turned_[kChunk][2 * scale * kTile + kWidthF];  // the last vector of a run may be read past the tiles
};

template <class K>
void make_direct_outputs(const Problem& p, const Positions<K>& g, std::int64_t first_row, std::int64_t rows, const BFloat16* pixels,
                         const BFloat16* weights, const Finish<BFloat16>& finish) {
  const std::vector<Pair> pairs = make_pairs_of_tiles(g, finish, first_row, rows);
  const auto count = static_cast<std::int64_t>(pairs.size());
  const std::int64_t panels = ceil_div(p.outputs, kPanel), strips = ceil_div(panels, 2), panel_size = g.blocks * K::count * kTileSize;
  parallel(strips * count, rows * g.row * p.outputs * p.channels * K::count, [&](std::int64_t begin, std::int64_t end) {
    const matrix_tiles::Tiles registers;
    const auto one = std::make_unique<Ending<K>>(finish), other = std::make_unique<Ending<K>>(finish);
    Ending<K>*now = one.get(), *before = other.get();
    std::vector<float> added(p.n * kChunk);
    for (std::int64_t i = begin; i < end; ++i) {
      const Pair& pair = pairs[i % count];
      const std::int64_t panel = i / count * 2, first = panel * kPanel, outputs = std::min(kChunk, p.outputs - first);
      const bool tall = pair.tiles == 2, wide = panel + 1 < panels;
      if (i == begin || i % count == 0) {
        while (before->step()) continue;
        take_added(p, first, outputs, added.data());
      }
      for (int phase_y = 0; phase_y < K::scale; ++phase_y) {
        now->begin(pair, phase_y, first, outputs, added.data());
        const std::int64_t at_once = ceil_div(before->pieces, g.blocks * K::count * K::scale);
        const auto beside = [&] { for (std::int64_t k = 0; k < at_once && before->step(); ++k) continue; };
        for (int phase_x = 0; phase_x < K::scale; ++phase_x) {
          const BFloat16* const corner = pixels + (K::scale == 2 ? phase_y * g.row + phase_x : 0) * kChunk;
          const BFloat16 *const above = corner + pair.at[0] * kChunk, *const below = corner + pair.at[1] * kChunk;
          const BFloat16* const of = weights + ((phase_y * K::scale + phase_x) * panels + panel) * panel_size;
          const auto run = [&]<int tiles, int columns>() {
            multiply_tiles<K, tiles, columns>(g, above, below, of, panel_size, now->sums[phase_x][0], beside);
          };
          if (tall) wide ? run.template operator()<2, 2>() : run.template operator()<2, 1>();
          else wide ? run.template operator()<1, 2>() : run.template operator()<1, 1>();
        }
        std::swap(now, before);
      }
    }
    while (before->step()) continue;
  });
}

template <class K, bool kSilu>
void forward_direct(Call& call, const Tensor& packed, Tensor* moments) {
  const Problem& p = call.problem;
  const Positions<K> g(p);
  const std::int64_t rows_at_once = rows_of_piece(p.height, p.width * K::phases);
  std::optional<Gathered> gathered;
  if (moments) gathered.emplace(call.output, p.channels_last, rows_at_once * K::scale);
  const Image<const BFloat16> x = image_of<BFloat16>(call.input);
  const Image<BFloat16> y(call.output, static_cast<BFloat16*>(call.output.mutable_data_ptr()));
  const std::optional<Image<const BFloat16>> r = image_of<BFloat16>(call.residual);
  const Finish<BFloat16> finish{p, y, r ? &*r : nullptr};
  const Scratch<BFloat16> memory(g.blocks * g.plane);
  BFloat16* const pixels = memory.get();
  const auto* const weights = static_cast<const BFloat16*>(packed.data_ptr());
  for (std::int64_t first = 0; first < g.rows; first += g.rows_of_group) {
    const std::int64_t rows = std::min(g.rows_of_group, g.rows - first);
    make_pixels<K, kSilu>(p, g, x, first, rows, pixels);
    make_direct_outputs<K>(p, g, first, rows, pixels, weights, finish);
    const auto above = [&](std::int64_t row) { return gathered->pieces_above(row, g.period, g.height, rows_at_once); };
    if (gathered) gathered->take_all(y.data, above(first), above(first + rows), true);
  }
  if (gathered) gathered->merge(y.data, static_cast<double*>(moments->mutable_data_ptr()));
}

template <int scale>
Tensor forward_packed_direct(const char* op, const Tensor& input, const Tensor& packed, std::int64_t out_channels, OptionalTensor bias,
                             OptionalTensor input_scale, OptionalTensor input_shift, std::int64_t activation, OptionalTensor embedding,
                             OptionalTensor residual, double output_scale, OptionalTensor skip, Tensor* moments = nullptr) {
  check_input(op, input);
  FASTGEN_CHECK(input.scalar_type() == ScalarType::BFloat16, op, ": input must be bfloat16");
  const std::int64_t taps = packed.dim() == 6 ? packed.size(3) : 0;
  FASTGEN_CHECK(packed.scalar_type() == ScalarType::BFloat16 && packed.is_contiguous() && (scale == 2 ? taps == 4 : taps == 9 || taps == 1) &&
                    packed.size(0) == scale * scale && packed.size(4) == kTile && packed.size(5) == kChunk,
                op, ": packed must be what the packing op returns");
  const std::int64_t channels = check_skip(op, input, skip);
  FASTGEN_CHECK(out_channels >= 1 && packed.size(1) == ceil_div(out_channels, kPanel) && packed.size(2) == ceil_div(channels, kChunk), op,
                ": packed must be for ", channels, " channels and out_channels=", out_channels);
  Call call = make_call<scale>(op, input, skip, channels, out_channels, bias, input_scale, input_shift, activation, embedding, residual, output_scale);
  if (moments) *moments = empty_moments(call.output);
  if (call.output.numel() == 0) return call.output;
  dispatch_taps<scale>(taps, [&]<class K>() {
    call.problem.silu ? forward_direct<K, true>(call, packed, moments) : forward_direct<K, false>(call, packed, moments);
  });
  return call.output;
}

}  // namespace fastgen::convolution
