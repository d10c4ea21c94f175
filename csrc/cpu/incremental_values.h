// Elements of a program's values: weights as they are stored, and activations.
#pragma once

#include "common/simd.h"
#include "common/simd/gelu.h"
#include "incremental_program.h"

namespace fastgen::incremental {

// A vector of weights in the type of the arithmetic.
template <class T, class W>
FASTGEN_INLINE Vec<T> load_weights(const W* p) {
  if constexpr (std::is_same_v<T, opmath_t<W>>) return load(p);
  else return Vec<T>([p](auto i) { return static_cast<T>(widen(p[i])); });
}

template <class T>
FASTGEN_INLINE Vec<T> activated(Activation activation, Vec<T> x) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kRelu: stdx::where(x < T(0), x) = T(0); return x;
    case Activation::kElu: return elu<T>(x);
    case Activation::kLeakyRelu: stdx::where(x < T(0), x) = x * T(0.01); return x;
    case Activation::kTanh: return tanh(x);
    case Activation::kSigmoid: return sigmoid_of_any<T>(x);
    case Activation::kSilu: return silu<T>(x);
    case Activation::kGelu: return gelu<T, Gelu::kNone>(x);
    case Activation::kGeluTanh: return gelu<T, Gelu::kTanh>(x);
    case Activation::kSoftplus: {  // max(x, 0) + log(1 + exp(-|x|)): libm's log1p, for a rare activation
      const Vec<T> rest([&](auto i) { return std::log1p(std::exp(-std::abs(static_cast<T>(x[i])))); });
      stdx::where(x < T(0), x) = T(0);
      return x + rest;
    }
    case Activation::kExp: return Vec<T>([&](auto i) { return std::exp(static_cast<T>(x[i])); });
  }
  return x;
}

}  // namespace fastgen::incremental
