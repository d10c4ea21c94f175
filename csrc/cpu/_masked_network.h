// Networks of masked linears: a program (NETWORK_HEADER in fastgen/_schema.py) read and checked, and its tasks carried out.
//
// Samples lie in the lanes: a value is a row of up to kMostVectors vectors. A task makes a few units of a layer of the first `known` rows
// of its source, which are all that the mask lets through, units being sorted by what they depend on. Its weights are spread one by one,
// its sums stay in registers, and bias, constants, gate, residual and activation are done before they leave. A block of samples goes
// through all tasks while its values stay in the second-level cache, and the weights stream past it. No sum depends on how samples are
// shared out.
#pragma once

#include <vector>

#include "_node_activation.h"
#include "common/tensor.h"

namespace fastgen::masked_network {

struct Header {
  std::int64_t features, outputs, rows, constants, layers, levels, tasks, residuals;
};
struct Layer {
  std::int64_t source, output, raw, add, gate, residual, activation, bias;
};
struct Level {
  std::int64_t task, tasks, feature, features, output, outputs;
};
struct Task {
  std::int64_t layer, first, units, known, weights;
};

// Of the tasks those of a level are checked when they are asked for: a program may be read once a level.
class Program {
 public:
  Program(const char* op, const Tensor& program, const Tensor& weights, const Tensor& parameters, const OptionalTensor& constants,
          std::int64_t samples);

  Header header{};
  const Layer* layers = nullptr;
  const Level* levels = nullptr;
  const Task* tasks = nullptr;
  const std::int64_t* residuals = nullptr;
  std::vector<std::int64_t> feature_places, output_places;  // where a feature, a column of the output, comes in the order of the program
  const std::int64_t* order = nullptr;                      // the feature at each place
  std::int64_t most_outputs = 0;                            // of a level
  const void *weights = nullptr, *parameters = nullptr, *constants = nullptr;

  void check(const char* op, const Level& level) const;
  void check_constants(const char* op, const OptionalTensor& given, std::int64_t samples, ScalarType dtype) const;

 private:
  std::int64_t weight_count_ = 0, parameter_count_ = 0;
};

#if defined(__AVX512F__)
inline constexpr int kMostVectors = 3, kMostUnits = 9;  // 27 sums, 3 values and a weight in 32 registers
#else
inline constexpr int kMostVectors = 2, kMostUnits = 6;  // 12, 2 and 1 in 16
#endif

// The samples of a batch in blocks of nearly the same number of vectors, some for each thread.
template <class T>
struct Blocks {
  std::int64_t samples, vectors, count;

  Blocks(std::int64_t samples, std::int64_t threads)
      : samples(samples), vectors((samples + kWidth<T> - 1) / kWidth<T>),
        count(std::max((vectors + kMostVectors - 1) / kMostVectors, std::min(threads, vectors))) {}

  struct Block {
    std::int64_t sample, samples, lanes;  // the first, how many there are, and with those that pad the last vector
  };
  Block operator[](std::int64_t i) const {
    const std::int64_t first = i * vectors / count, last = (i + 1) * vectors / count;
    return {first * kWidth<T>, std::min(last * kWidth<T>, samples) - first * kWidth<T>, (last - first) * kWidth<T>};
  }
};

// The tasks of a level, on values [rows][lanes]; the last layer goes to outputs [outputs of the level][lanes].
template <class T>
void run(const Program& p, const Level& level, std::int64_t lanes, T* values, T* outputs);

// sums[u][lane], u < units <= kMostUnits, over the first `known` rows of values [known][lanes], by weights [known][stride].
template <class T>
void multiply(std::int64_t units, std::int64_t lanes, const T* values, const T* weights, std::int64_t stride, std::int64_t known, T* sums);

// Rows place(c) of `rows`, [lanes] each, from column c of samples [samples][stride]; what pads the lanes is zero.
template <class T, class S, class Place>
void read_rows(const S* from, std::int64_t stride, std::int64_t samples, std::int64_t columns, std::int64_t lanes, const Place& place, T* rows) {
  constexpr std::int64_t w = kWidth<T>;
  if constexpr (std::is_same_v<opmath_t<S>, T>) {
    for (std::int64_t i = 0; i < lanes; i += w)
      for (std::int64_t c = 0; c < columns; c += w) {
        const std::int64_t across = std::min(w, columns - c);
        Vec<T> square[w];
        for (std::int64_t k = 0; k < w; ++k) {
          const S* const p = from + (i + k) * stride + c;
          square[k] = i + k >= samples ? Vec<T>(T(0)) : across == w ? load(p) : load_part(p, static_cast<int>(across));
        }
        transpose(square);
        for (std::int64_t k = 0; k < across; ++k) store(rows + place(c + k) * lanes + i, square[k]);
      }
  } else {
    for (std::int64_t c = 0; c < columns; ++c)
      for (std::int64_t i = 0; i < lanes; ++i) rows[place(c) * lanes + i] = i < samples ? static_cast<T>(widen(from[i * stride + c])) : T(0);
  }
}

// The way back.
template <class T, class S, class Place>
void write_rows(const T* rows, std::int64_t lanes, std::int64_t samples, std::int64_t columns, const Place& place, S* to, std::int64_t stride) {
  constexpr std::int64_t w = kWidth<T>;
  if constexpr (std::is_same_v<opmath_t<S>, T>) {
    for (std::int64_t i = 0; i < samples; i += w)
      for (std::int64_t c = 0; c < columns; c += w) {
        const std::int64_t across = std::min(w, columns - c), down = std::min(w, samples - i);
        Vec<T> square[w];
        for (std::int64_t k = 0; k < w; ++k) square[k] = k < across ? load(rows + place(c + k) * lanes + i) : Vec<T>(T(0));
        transpose(square);
        for (std::int64_t k = 0; k < down; ++k) {
          S* const p = to + (i + k) * stride + c;
          if (across == w) store(p, square[k]);
          else store_part(p, square[k], static_cast<int>(across));
        }
      }
  } else {
    for (std::int64_t c = 0; c < columns; ++c)
      for (std::int64_t i = 0; i < samples; ++i) to[i * stride + c] = narrow<S>(static_cast<opmath_t<S>>(rows[place(c) * lanes + i]));
  }
}

// Calls f with the type of the arithmetic.
template <class F>
auto dispatch(const char* op, const Tensor& weights, F&& f) {
  FASTGEN_CHECK(weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double, op,
                ": weights must be float32 or float64");
  return weights.scalar_type() == ScalarType::Double ? f.template operator()<double>() : f.template operator()<float>();
}

}  // namespace fastgen::masked_network
