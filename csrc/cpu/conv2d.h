// What the files of conv2d share: the tiles that a convolution is cut into, the layout of packed weights, and the transforms of
// Winograd's minimal filtering F(m x m, 3 x 3) in one dimension (Lavin and Gray 2015, with the points 0, 1, -1, 2, -2, infinity).
//
// A tile of m x m outputs of a 3x3 kernel reads (m + 2) x (m + 2) inputs. Transformed to as many points, inputs and weights are
// multiplied point by point, and each point sums over the channels: a matrix product a point, with
// 9 m^2 / (m + 2)^2 = 4 (m = 4) or 2.25 (m = 2) times fewer multiplications than the convolution. A 1x1 kernel is the case of one
// point, whose transforms do nothing.
//
// Packed weights are [points, panels, C, kPanel] in fp32: the transformed weights of each point as _product.h takes them;
// `fastgen/reference/conv2d.py` says the same.
#pragma once

#include "_product.h"
#include "common/tensor.h"

namespace fastgen::conv2d {

// m outputs a side; m = 1 stands for the 1x1 kernel.
template <int m>
struct Tile {
  static constexpr int outputs = m, kernel = m == 1 ? 1 : 3, side = m + kernel - 1, points = side * side, halo = kernel / 2;
};

// The number of outputs a side that packed weights of so many points are for; 0 if for none.
constexpr int outputs_of(std::int64_t points) { return points == 36 ? 4 : points == 16 ? 2 : points == 1 ? 1 : 0; }

// Calls f with the number of outputs a side: f.template operator()<m>().
template <class F>
inline auto dispatch_tile(int outputs, F&& f) {
  switch (outputs) {
    case 4: return f.template operator()<4>();
    case 2: return f.template operator()<2>();
    default: return f.template operator()<1>();
  }
}

// B^T d: side values of the input to side points.
template <int m, class V>
FASTGEN_INLINE void input_points(const V (&d)[Tile<m>::side], V (&p)[Tile<m>::side]) {
  if constexpr (m == 4) {
    const V a = madd<float>(d[2], V(-4.0f), d[4]), b = madd<float>(d[1], V(-4.0f), d[3]);
    const V c = d[4] - d[2], e = d[3] - d[1];
    p[0] = madd<float>(d[2], V(-5.0f), madd<float>(d[0], V(4.0f), d[4]));
    p[1] = a + b;
    p[2] = a - b;
    p[3] = madd<float>(e, V(2.0f), c);
    p[4] = madd<float>(e, V(-2.0f), c);
    p[5] = madd<float>(d[3], V(-5.0f), madd<float>(d[1], V(4.0f), d[5]));
  } else if constexpr (m == 2) {
    p[0] = d[0] - d[2], p[1] = d[1] + d[2], p[2] = d[2] - d[1], p[3] = d[1] - d[3];
  } else {
    p[0] = d[0];
  }
}

// A^T p: side points to m outputs.
template <int m, class V>
FASTGEN_INLINE void output_values(const V (&p)[Tile<m>::side], V (&y)[m]) {
  if constexpr (m == 4) {
    const V a = p[1] + p[2], b = p[1] - p[2], c = p[3] + p[4], d = p[3] - p[4];
    y[0] = p[0] + a + c;
    y[1] = madd<float>(d, V(2.0f), b);
    y[2] = madd<float>(c, V(4.0f), a);
    y[3] = madd<float>(d, V(8.0f), b) + p[5];
  } else if constexpr (m == 2) {
    y[0] = p[0] + p[1] + p[2], y[1] = p[1] - p[2] - p[3];
  } else {
    y[0] = p[0];
  }
}

// G g: the weights of a row to side points, in fp64, so that packed weights are rounded once.
template <int m>
inline void weight_points(const double (&g)[Tile<m>::kernel], double (&p)[Tile<m>::side]) {
  if constexpr (m == 4) {
    const double outer = (g[0] + g[2]) / 6, far = g[0] / 24 + g[2] / 6;
    p[0] = g[0] / 4;
    p[1] = -outer - g[1] / 6;
    p[2] = -outer + g[1] / 6;
    p[3] = far + g[1] / 12;
    p[4] = far - g[1] / 12;
    p[5] = g[2];
  } else if constexpr (m == 2) {
    p[0] = g[0], p[1] = (g[0] + g[1] + g[2]) / 2, p[2] = (g[0] - g[1] + g[2]) / 2, p[3] = g[2];
  } else {
    p[0] = g[0];
  }
}

}  // namespace fastgen::conv2d
