// The activations that follow a node of a network, NODE_ACTIVATIONS of fastgen/_schema.py.
#pragma once

#include "common/simd.h"
#include "common/simd/gelu.h"

namespace fastgen {

enum class NodeActivation { kNone, kRelu, kElu, kLeakyRelu, kTanh, kSigmoid, kSilu, kGelu, kGeluTanh, kSoftplus, kExp };
inline constexpr std::int64_t kNodeActivations = 11;

template <class T>
FASTGEN_INLINE Vec<T> activated(NodeActivation activation, Vec<T> x) {
  switch (activation) {
    case NodeActivation::kNone: return x;
    case NodeActivation::kRelu: stdx::where(x < T(0), x) = T(0); return x;
    case NodeActivation::kElu: return elu<T>(x);
    case NodeActivation::kLeakyRelu: stdx::where(x < T(0), x) = x * T(0.01); return x;
    case NodeActivation::kTanh: return tanh(x);
    case NodeActivation::kSigmoid: return sigmoid_of_any<T>(x);
    case NodeActivation::kSilu: return silu<T>(x);
    case NodeActivation::kGelu: return gelu<T, Gelu::kNone>(x);
    case NodeActivation::kGeluTanh: return gelu<T, Gelu::kTanh>(x);
    case NodeActivation::kSoftplus: {  // max(x, 0) + log(1 + exp(-|x|)): libm's log1p, for a rare activation
      const Vec<T> rest([&](auto i) { return std::log1p(std::exp(-std::abs(static_cast<T>(x[i])))); });
      stdx::where(x < T(0), x) = T(0);
      return x + rest;
    }
    case NodeActivation::kExp: return Vec<T>([&](auto i) { return std::exp(static_cast<T>(x[i])); });
  }
  return x;
}

}  // namespace fastgen
