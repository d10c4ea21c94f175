// Per-sample coefficients: entries of small tables at each sample's timestep.
#pragma once

#include "common/tensor.h"

namespace fastgen {

// The timesteps of a batch, checked against the length of the tables they index.
class Timesteps {
 public:
  Timesteps(const char* op, const Tensor& t, std::int64_t samples, std::int64_t steps) : op_(op), steps_(steps), t_(samples) {
    STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.size(0) == samples, op,
                    ": t must be int64, one per sample");
    const auto* p = static_cast<const std::int64_t*>(t.data_ptr());
    for (std::int64_t n = 0; n < samples; ++n) {
      t_[n] = p[n * t.stride(0)];
      STD_TORCH_CHECK(t_[n] >= 0 && t_[n] < steps, op, ": t must be in [0, ", steps, "), got t[", n, "] = ", t_[n]);
    }
  }

  std::int64_t operator[](std::int64_t n) const { return t_[n]; }

  // Column `column` of a [T] or [T, K] table at every sample's timestep.
  std::vector<double> read(const char* name, const Tensor& table, std::int64_t column = 0) const {
    STD_TORCH_CHECK((table.dim() == 1 || table.dim() == 2) && table.size(0) == steps_ && (table.dim() == 1 || column < table.size(1)),
                    op_, ": ", name, " must have ", steps_, " rows, and more than ", column, " columns if it has any");
    std::vector<double> values(t_.size());
    dispatch_dtype(op_, table.scalar_type(), [&]<class T>() {
      const T* p = static_cast<const T*>(table.data_ptr()) + (table.dim() == 2 ? column * table.stride(1) : 0);
      for (std::size_t n = 0; n < t_.size(); ++n) values[n] = static_cast<double>(widen(p[t_[n] * table.stride(0)]));
    });
    return values;
  }

 private:
  const char* op_;
  std::int64_t steps_;
  std::vector<std::int64_t> t_;
};

// What a model predicts, in the order of PREDICTION_TYPES in fastgen/_schema.py.
enum class Prediction : std::int64_t { kEpsilon, kSample, kVelocity, kFlow };

// The target of a prediction is x0_part * x0 + noise_part * epsilon; a part that is not there takes nothing, not even a NaN.
struct TargetParts {
  bool takes_x0, takes_noise;
  double x0_part, noise_part;
};
inline TargetParts target_parts(Prediction prediction, double alpha, double sigma) {
  switch (prediction) {
    case Prediction::kEpsilon: return {false, true, 0.0, 1.0};
    case Prediction::kSample: return {true, false, 1.0, 0.0};
    case Prediction::kVelocity: return {true, true, -sigma, alpha};
    default: return {true, true, -1.0, 1.0};
  }
}

}  // namespace fastgen
