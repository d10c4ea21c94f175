// What convolutions by tiles share, conv2d and upsample_conv2d: the tiles that an image is cut into, the layout of packed weights, and
// the transforms of Winograd's minimal filtering F(m x m, 3 x 3) in one dimension (Lavin and Gray 2015, with the points 0, 1, -1, 2,
// -2, infinity).
//
// A tile of m x m outputs of a 3x3 kernel reads (m + 2) x (m + 2) inputs. Transformed to as many points, inputs and weights are
// multiplied point by point, and each point sums over the channels: a matrix product a point, with
// 9 m^2 / (m + 2)^2 = 4 (m = 4) or 2.25 (m = 2) times fewer multiplications than the convolution. A 1x1 kernel is the case of one
// point, whose transforms do nothing.
//
// After nearest upsampling by two, an output 2i + p of phase p in {0, 1} reads two neighbours of the small image: the kernel
// (w0, w1 + w2, 0) around i for p = 0, (0, w0 + w1, w2) for p = 1. So four 3x3 kernels, one for each pair of phases, read one transformed
// image, and a kernel that ends in a zero has no product at the point infinity, one that begins with a zero none at the point 0: a
// tile of 2m x 2m outputs takes 4 (m + 1)^2 products, 9 * 4 m^2 / (4 (m + 1)^2) = 5.76 (m = 4) or 4 (m = 2) times fewer multiplications.
//
// Packed weights are [blocks, panels, C, kPanel] in fp32, a block a product: the transformed weights as _product.h takes them;
// `fastgen/reference/_convolution.py` says the same.
#pragma once

#include "_product.h"
#include "common/tensor.h"

namespace fastgen::convolution {

// m outputs a side of each of scale x scale phases; m = 1 stands for the 1x1 kernel.
template <int m, int s = 1>
struct Tile {
  static constexpr int outputs = m, scale = s, kernel = m == 1 ? 1 : 3, side = m + kernel - 1, points = side * side, halo = kernel / 2;
  static constexpr int blocks = s == 1 ? points : 4 * (side - 1) * (side - 1);

  // Along one dimension, phase p has products at the points [first(p), last(p)).
  static constexpr int first(int p) { return s == 2 && p == 1; }
  static constexpr int last(int p) { return side - (s == 2 && p == 0); }
  static constexpr bool has(int p, int point) { return first(p) <= point && point < last(p); }
};

// Calls f with each pair of phases, of rows and of columns: f.template operator()<p, q>().
template <class G, class F>
FASTGEN_INLINE void for_phases(const F& f) {
  f.template operator()<0, 0>();
  if constexpr (G::scale == 2) f.template operator()<0, 1>(), f.template operator()<1, 0>(), f.template operator()<1, 1>();
}

// The products of a tile in order: point by point, so that those that read the same values are neighbours, and phase by phase.
template <class G>
struct Blocks {
  int point[G::blocks] = {};
  int at[G::scale][G::scale][G::side][G::side] = {};  // [phase of y][phase of x][point of y][point of x] -> block

  constexpr Blocks() {
    int block = 0;
    for (int i = 0; i < G::side; ++i)
      for (int j = 0; j < G::side; ++j)
        for (int p = 0; p < G::scale; ++p)
          for (int q = 0; q < G::scale; ++q)
            if (G::has(p, i) && G::has(q, j)) point[block] = i * G::side + j, at[p][q][i][j] = block++;
  }
};
template <class G>
inline constexpr Blocks<G> kBlocks{};

// The number of outputs a side that packed weights of so many blocks are for; 0 if for none.
template <int scale>
constexpr int outputs_of(std::int64_t blocks) {
  if (blocks == Tile<4, scale>::blocks) return 4;
  if (blocks == Tile<2, scale>::blocks) return 2;
  return scale == 1 && blocks == 1 ? 1 : 0;
}

// Calls f with the kind of tile that has so many outputs a side: f.template operator()<Tile<outputs, scale>>().
template <int scale, class F>
inline auto dispatch_tile(std::int64_t outputs, F&& f) {
  if (outputs == 4) return f.template operator()<Tile<4, scale>>();
  if constexpr (scale == 1)
    if (outputs == 1) return f.template operator()<Tile<1>>();
  return f.template operator()<Tile<2, scale>>();
}

// B^T d: side values of the input to side points.
template <class G, class V>
FASTGEN_INLINE void input_points(const V (&d)[G::side], V (&p)[G::side]) {
  if constexpr (G::outputs == 4) {
    const V a = madd<float>(d[2], V(-4.0f), d[4]), b = madd<float>(d[1], V(-4.0f), d[3]);
    const V c = d[4] - d[2], e = d[3] - d[1];
    p[0] = madd<float>(d[2], V(-5.0f), madd<float>(d[0], V(4.0f), d[4]));
    p[1] = a + b;
    p[2] = a - b;
    p[3] = madd<float>(e, V(2.0f), c);
    p[4] = madd<float>(e, V(-2.0f), c);
    p[5] = madd<float>(d[3], V(-5.0f), madd<float>(d[1], V(4.0f), d[5]));
  } else if constexpr (G::outputs == 2) {
    p[0] = d[0] - d[2], p[1] = d[1] + d[2], p[2] = d[2] - d[1], p[3] = d[1] - d[3];
  } else {
    p[0] = d[0];
  }
}

// A^T p: the points of a phase to m outputs; others are not looked at.
template <class G, int phase, class V>
FASTGEN_INLINE void output_values(const V (&p)[G::side], V (&y)[G::outputs]) {
  constexpr bool zero = G::has(phase, 0), infinity = G::has(phase, G::side - 1);
  if constexpr (G::outputs == 4) {
    const V a = p[1] + p[2], b = p[1] - p[2], c = p[3] + p[4], d = p[3] - p[4];
    y[0] = a + c;
    if constexpr (zero) y[0] = p[0] + a + c;
    y[1] = madd<float>(d, V(2.0f), b);
    y[2] = madd<float>(c, V(4.0f), a);
    y[3] = madd<float>(d, V(8.0f), b);
    if constexpr (infinity) y[3] += p[5];
  } else if constexpr (G::outputs == 2) {
    y[0] = p[1] + p[2], y[1] = p[1] - p[2];
    if constexpr (zero) y[0] = p[0] + p[1] + p[2];
    if constexpr (infinity) y[1] -= p[3];
  } else {
    y[0] = p[0];
  }
}

// G g: the weights of a row to side points, in fp64, so that packed weights are rounded once.
template <class G>
inline void weight_points(const double (&g)[G::kernel], double (&p)[G::side]) {
  if constexpr (G::outputs == 4) {
    const double outer = (g[0] + g[2]) / 6, far = g[0] / 24 + g[2] / 6;
    p[0] = g[0] / 4;
    p[1] = -outer - g[1] / 6;
    p[2] = -outer + g[1] / 6;
    p[3] = far + g[1] / 12;
    p[4] = far - g[1] / 12;
    p[5] = g[2];
  } else if constexpr (G::outputs == 2) {
    p[0] = g[0], p[1] = (g[0] + g[1] + g[2]) / 2, p[2] = (g[0] - g[1] + g[2]) / 2, p[3] = g[2];
  } else {
    p[0] = g[0];
  }
}

// The kernel of a row of weights that phase p of the outputs sees on the small image.
template <class G>
inline void phase_kernel(int p, double (&g)[G::kernel]) {
  if constexpr (G::scale == 2) {
    if (p == 0) g[1] += g[2], g[2] = 0;
    if (p == 1) g[1] += g[0], g[0] = 0;
  }
}

}  // namespace fastgen::convolution
