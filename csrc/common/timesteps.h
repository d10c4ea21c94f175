// Per-sample coefficients: entries of small tables at each sample's timestep.
#pragma once

#include "common/tensor.h"

namespace fastgen {

// The timesteps of a batch, checked against the length of the tables they index.
class Timesteps {
 public:
  // `first` is the table [T] that says how many there are.
  Timesteps(const char* op, const Tensor& t, std::int64_t samples, const Tensor& first) : op_(op), t_(samples) {
    FASTGEN_CHECK(first.dim() == 1, op, ": tables must be [T], got one of ", first.dim(), " dimensions");
    steps_ = first.size(0);
    FASTGEN_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.size(0) == samples, op, ": t must be int64, one per sample");
    const auto* p = static_cast<const std::int64_t*>(t.data_ptr());
    for (std::int64_t n = 0; n < samples; ++n) {
      t_[n] = p[n * t.stride(0)];
      FASTGEN_CHECK(t_[n] >= 0 && t_[n] < steps_, op, ": t must be in [0, ", steps_, "), got t[", n, "] = ", t_[n]);
    }
  }

  std::int64_t operator[](std::int64_t n) const { return t_[n]; }

  // A [T] table at every sample's timestep.
  std::vector<double> read(const char* name, const Tensor& table) const {
    FASTGEN_CHECK(table.dim() == 1 && table.size(0) == steps_, op_, ": ", name, " must be [T] with T = ", steps_);
    return gather(name, table, 0);
  }

  // Column `column` of a [T, columns] table.
  std::vector<double> read_column(const char* name, const Tensor& table, std::int64_t column, std::int64_t columns) const {
    FASTGEN_CHECK(table.dim() == 2 && table.size(0) == steps_ && table.size(1) == columns, op_, ": ", name, " must be [T, ", columns,
                  "] with T = ", steps_);
    return gather(name, table, column * table.stride(1));
  }

 private:
  std::vector<double> gather(const char* name, const Tensor& table, std::int64_t first) const {
    check_floating(op_, name, table);
    std::vector<double> values(t_.size());
    dispatch_dtype(op_, table.scalar_type(), [&]<class T>() {
      const T* p = static_cast<const T*>(table.data_ptr()) + first;
      for (std::size_t n = 0; n < t_.size(); ++n) values[n] = static_cast<double>(widen(p[t_[n] * table.stride(0)]));
    });
    return values;
  }

  const char* op_;
  std::int64_t steps_ = 0;
  std::vector<std::int64_t> t_;
};

// What a model predicts, in the order of PREDICTION_TYPES in fastgen/_schema.py.
enum class Prediction : std::int64_t { kEpsilon, kSample, kVelocity, kFlow };
inline constexpr std::int64_t kNumPredictions = 4;

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
