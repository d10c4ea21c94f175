// What runs a program: its buffers in memory, and one instruction at a time for a row of places or a single one.
//
// A buffer holds the last few rows of a node, [rows][N][columns][C] with columns of zeros on either side, so that a run of taps is one
// stretch of numbers for every place and image. A share says which images a thread has, or, where all threads work on the same images,
// which part of the outputs.
#pragma once

#include <cmath>

#include "incremental_combine.h"

namespace fastgen::incremental {

struct Share {
  std::int64_t first, last;  // images
  std::int64_t part, parts;  // of the outputs

  // The part of `count` things.
  std::pair<std::int64_t, std::int64_t> of(std::int64_t count) const { return {part * count / parts, (part + 1) * count / parts}; }
};

// The weights that products read, of a type that they alone know.
template <class T>
struct Weights {
  const char* data;
  std::int64_t size;  // of one, in bytes
  void (*combine)(const Tile<T>&, std::int64_t, std::int64_t);

  template <class W>
  static Weights of(const W* data) { return {reinterpret_cast<const char*>(data), sizeof(W), combine_with<W>}; }

 private:
  template <class W>
  static void combine_with(const Tile<T>& tile, std::int64_t first, std::int64_t last) { incremental::combine<T, W>(tile, first, last); }
};

template <class T>
class Machine {
 public:
  Machine(const Program& program, T* state, const Weights<T>& weights, const T* parameters, const std::vector<Tensor>& constants,
          std::int64_t images)
      : program_(program), weights_(weights), parameters_(parameters), images_(images) {
    for (const Buffer& b : program.buffers) {
      if (b.constant < 0) {
        places_.push_back({state + b.offset * images, b.rows - 1, images * b.columns() * b.channels, b.columns() * b.channels, b.channels, true});
        places_.back().data += b.left * b.channels;
      } else {  // [1 or N, 1 or H, 1 or W, C]
        const Tensor& t = constants[static_cast<std::size_t>(b.constant)];
        const std::int64_t row = b.width * b.channels;
        places_.push_back({const_cast<T*>(static_cast<const T*>(t.data_ptr())), b.height == 1 ? 0 : ~std::int64_t{0}, row,
                           t.size(0) == 1 ? 0 : b.height * row, b.width == 1 ? 0 : b.channels, b.height > 1});
      }
    }
  }

  // Where the channels of image n at (y, x) of a buffer begin; null above its first row and below its last.
  T* at(std::int64_t buffer, std::int64_t y, std::int64_t n, std::int64_t x) const {
    const Buffer& b = program_.buffers[static_cast<std::size_t>(buffer)];
    const Place& p = places_[static_cast<std::size_t>(buffer)];
    if ((y < 0 || y >= b.height) && p.bounded) return nullptr;
    return p.data + (y & p.mask) * p.row + n * p.image + x * p.column;
  }
  const T* logits(std::int64_t y, std::int64_t n, std::int64_t x) const { return at(program_.output.buffer, y, n, x) + program_.output.start; }

  // An instruction for the places [x0, x1) of row y, of its own resolution.
  void run(const Instruction& i, std::int64_t y, std::int64_t x0, std::int64_t x1, const Share& share) {
    switch (i.kind) {
      case Kind::kCombine: return combine_places(i, y, x0, x1, share);
      case Kind::kProduct: return product(i, y, x0, x1, share);
      case Kind::kConcat: return concat(i, y, x0, x1, share);
      case Kind::kLayerNorm: return layer_norm(i, y, x0, x1, share);
      case Kind::kAttention: return attention(i, y, x0, x1, share);
      case Kind::kEmbedding: return embedding(i, y, x0, x1, share);
    }
  }

 private:
  struct Place {
    T* data;
    std::int64_t mask, row, image, column;
    bool bounded;  // not one row for all
  };

  const Buffer& buffer(std::int64_t b) const { return program_.buffers[static_cast<std::size_t>(b)]; }
  const T* operand(const Operand& o, std::int64_t y, std::int64_t n, std::int64_t x) const {
    const T* const p = at(o.buffer, y + o.dy, n, x + o.dx);
    return p == nullptr ? nullptr : p + o.start;
  }
  T scale_of(std::int64_t parameter) const { return parameter < 0 ? T(1) : parameters_[parameter]; }

  // f(image, x) for every place of a share.
  template <class F>
  void each(std::int64_t x0, std::int64_t x1, const Share& share, const F& f) const {
    for (std::int64_t n = share.first; n < share.last; ++n)
      for (std::int64_t x = x0; x < x1; ++x) f(n, x);
  }

  // Channels [first, last) of a part, a multiple of 16 but for the end: threads do not write to one line of the cache.
  static std::pair<std::int64_t, std::int64_t> channels_of(const Share& share, std::int64_t count) {
    const auto [first, last] = share.of((count + kPanel - 1) / kPanel);
    return {first * kPanel, std::min(last * kPanel, count)};
  }

  void combine_places(const Instruction& i, std::int64_t y, std::int64_t x0, std::int64_t x1, const Share& share) {
    const auto [first, last] = share.of((buffer(i.output).channels + kPanel - 1) / kPanel);
    if (first == last) return;
    if (x1 - x0 == 1) return tile(i, y, x0, 1, share.first, share.last - share.first, first, last);
    for (std::int64_t n = share.first; n < share.last; ++n)
      for (std::int64_t phase = 0; phase < i.upscale && x0 + phase < x1; ++phase)
        tile(i, y, x0 + phase, (x1 - x0 - phase + i.upscale - 1) / i.upscale, n, 1, first, last);
  }

  // `columns` places of row y from x on, i.upscale apart, of one image; or one place of `images`.
  void tile(const Instruction& i, std::int64_t y, std::int64_t x, std::int64_t columns, std::int64_t n, std::int64_t images, std::int64_t first,
            std::int64_t last) {
    thread_local Tile<T> t;
    const bool along = images == 1;  // rows of the tile are columns of the image
    const std::int64_t u = i.upscale, channels = buffer(i.output).channels;
    const Phase& phase = i.phases[static_cast<std::size_t>(y % u * u + x % u)];
    const auto step = [&](std::int64_t b, std::int64_t by) {
      const Place& p = places_[static_cast<std::size_t>(b)];
      return along ? by * p.column : p.image;
    };
    t.rows = along ? columns : images, t.channels = channels, t.total = phase.total;
    t.weights = weights_.data + phase.weights * weights_.size;
    t.bias = i.bias < 0 ? nullptr : parameters_ + i.bias;
    t.out = at(i.output, y, n, x), t.out_stride = step(i.output, u);
    t.activation = i.activation;
    t.runs.clear(), t.terms.clear();
    std::int64_t offset = 0;
    for (const Segment& s : phase.segments) {
      const T* const data = at(s.source.buffer, s.stride * (y / u) + s.source.dy, n, s.stride * (x / u));
      if (data != nullptr)
        t.runs.push_back({data + s.source.dx * buffer(s.source.buffer).channels + s.source.start, step(s.source.buffer, s.stride), s.length, offset});
      offset += s.length;
    }
    for (const Addend& a : i.addends)
      if (const T* const data = operand(a.source, y, n, x)) t.terms.push_back({data, step(a.source.buffer, u), scale_of(a.scale)});
    weights_.combine(t, first, last);
  }

  // out = f(at, i) for the channels of a share at (y, x), where the operands that f reads begin at `sources`; zeros beyond an edge.
  void product(const Instruction& i, std::int64_t y, std::int64_t x0, std::int64_t x1, const Share& share) const {
    const auto [first, last] = channels_of(share, buffer(i.output).channels);
    each(x0, x1, share, [&, first = first, last = last](std::int64_t n, std::int64_t x) {
      T* const out = at(i.output, y, n, x) + first;
      const T *const a = operand(i.parts[0].source, y, n, x), *const b = operand(i.parts[1].source, y, n, x);
      for_vectors<T>(last - first, [&](std::int64_t k, auto at) {
        const Vec<T> left = a == nullptr ? Vec<T>(T(0)) : at.load(a + first + k), right = b == nullptr ? Vec<T>(T(0)) : at.load(b + first + k);
        at.store(out + k, activated<T>(i.activation, left) * activated<T>(i.gate, right));
      });
    });
  }

  void concat(const Instruction& i, std::int64_t y, std::int64_t x0, std::int64_t x1, const Share& share) const {
    std::int64_t begin = 0;
    for (const Part& part : i.parts) {
      const auto [first, last] = channels_of(share, part.channels);
      const Vec<T> scale(scale_of(part.scale));
      each(x0, x1, share, [&, first = first, last = last](std::int64_t n, std::int64_t x) {
        T* const out = at(i.output, y, n, x) + begin + first;
        const T* const from = operand(part.source, y, n, x);
        for_vectors<T>(last - first, [&](std::int64_t k, auto at) {
          at.store(out + k, activated<T>(i.activation, from == nullptr ? Vec<T>(T(0)) : scale * at.load(from + first + k)));
        });
      });
      begin += part.channels;
    }
  }

  void layer_norm(const Instruction& i, std::int64_t y, std::int64_t x0, std::int64_t x1, const Share& share) const {
    const std::int64_t count = buffer(i.output).channels;
    const T *const weight = i.weight < 0 ? nullptr : parameters_ + i.weight, *const bias = i.bias < 0 ? nullptr : parameters_ + i.bias;
    thread_local std::vector<T> zeros;
    zeros.assign(static_cast<std::size_t>(count), T(0));
    each(x0, x1, share, [&](std::int64_t n, std::int64_t x) {
      if ((n + x) % share.parts != share.part) return;
      T* const out = at(i.output, y, n, x);
      const T* from = operand(i.parts[0].source, y, n, x);
      if (from == nullptr) from = zeros.data();
      const T mean = sum_vectors<T>(count, [&](std::int64_t k, auto at) { return at.load(from + k); }) / static_cast<T>(count);
      const T square = sum_vectors<T>(count, [&](std::int64_t k, auto at) {
        const Vec<T> away = at.load(from + k) - mean;
        return away * away;
      });
      const Vec<T> rstd(T(1) / std::sqrt(square / static_cast<T>(count) + parameters_[i.eps]));
      for_vectors<T>(count, [&](std::int64_t k, auto at) {
        Vec<T> z = (at.load(from + k) - mean) * rstd;
        if (weight != nullptr) z *= at.load(weight + k);
        if (bias != nullptr) z += at.load(bias + k);
        at.store(out + k, z);
      });
    });
  }

  // Head by head: scores of all positions, their softmax, the sum of values.
  void attention(const Instruction& i, std::int64_t y, std::int64_t x0, std::int64_t x1, const Share& share) const {
    const std::int64_t width = buffer(i.output).width, keys = i.parts[0].channels / i.heads, values = i.parts[2].channels / i.heads;
    const T scale = parameters_[i.scale];
    thread_local std::vector<T> scores;
    each(x0, x1, share, [&](std::int64_t n, std::int64_t x) {
      const std::int64_t count = y * width + x + (i.strict ? 0 : 1);
      scores.resize(static_cast<std::size_t>(count));
      for (std::int64_t h = share.part; h < i.heads; h += share.parts) {
        const T* const query = operand(i.parts[0].source, y, n, x) + h * keys;
        T* const out = at(i.output, y, n, x) + h * values;
        T most = -std::numeric_limits<T>::infinity(), total = 0;
        positions(count, width, i.parts[1].source, n, [&](std::int64_t p, const T* key) {
          T dot = 0;
          for (std::int64_t e = 0; e < keys; ++e) dot += query[e] * key[h * keys + e];
          scores[static_cast<std::size_t>(p)] = dot * scale;
          most = std::max(most, dot * scale);
        });
        for_vectors<T>(count, [&](std::int64_t p, auto at) { at.store(scores.data() + p, exp(at.load(scores.data() + p) - most)); });
        for (std::int64_t e = 0; e < values; ++e) out[e] = T(0);
        positions(count, width, i.parts[2].source, n, [&](std::int64_t p, const T* value) {
          const T weight = scores[static_cast<std::size_t>(p)];
          total += weight;
          for (std::int64_t e = 0; e < values; ++e) out[e] += weight * value[h * values + e];
        });
        for (std::int64_t e = 0; count > 0 && e < values; ++e) out[e] /= total;
      }
    });
  }

  // f(position, its channels) of the first `count` positions in raster order.
  template <class F>
  void positions(std::int64_t count, std::int64_t width, const Operand& o, std::int64_t n, const F& f) const {
    for (std::int64_t row = 0; row * width < count; ++row) {
      const T* const data = operand(o, row, n, 0);
      const std::int64_t column = places_[static_cast<std::size_t>(o.buffer)].column, in_row = std::min(width, count - row * width);
      for (std::int64_t x = 0; x < in_row; ++x) f(row * width + x, data + x * column);
    }
  }

  void embedding(const Instruction& i, std::int64_t y, std::int64_t x0, std::int64_t x1, const Share& share) const {
    each(x0, x1, share, [&](std::int64_t n, std::int64_t x) {
      if ((n + x) % share.parts != share.part) return;
      T* const out = at(i.output, y, n, x);
      const T* const from = operand(i.parts[0].source, y, n, x);
      for (std::int64_t c = 0; c < i.parts[0].channels; ++c) {
        const T level = from == nullptr ? T(0) : std::nearbyint(from[c]);
        const auto k = level >= T(0) ? static_cast<std::int64_t>(std::min(level, static_cast<T>(i.levels - 1))) : std::int64_t{0};  // a NaN too
        std::copy_n(parameters_ + i.table + k * i.width, i.width, out + c * i.width);
      }
    });
  }

  const Program& program_;
  const Weights<T> weights_;
  const T* const parameters_;
  const std::int64_t images_;
  std::vector<Place> places_;
};

}  // namespace fastgen::incremental
