// Matrix products with packed weights: rows of values times panels of kPanel outputs, in fp32, by one thread.
//
// Packed weights are [panels, C, kPanel]: the weights of kPanel outputs side by side, zero beyond the last. One layout for all
// variants; `fastgen/reference` says the same.
#pragma once

#include "common/simd.h"

namespace fastgen {

inline constexpr std::int64_t kPanel = 16;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// products[r][k] = sum over l < lines and c < channels of values[l][r][c] weights[l][c][k], and what was there where `add`.
struct Product {
  const float* values;   // [lines, value_line apart][rows][value_stride]
  const float* weights;  // [panels, panel_stride apart][lines, weight_line apart][channels][kPanel]
  float* products;       // [rows][product_stride]
  std::int64_t rows, channels, value_stride, product_stride;
  std::int64_t panel_stride = channels * kPanel, lines = 1, value_line = 0, weight_line = 0;
  bool add = false;
  const float* next = nullptr;  // weights that are wanted after the last of these panels, in panels as far apart
};

// The panels [first, last) of all rows.
void multiply(const Product& p, std::int64_t first, std::int64_t last);

}  // namespace fastgen
