// Reading of programs and the products of their tasks; see _masked_network.h.
#include "_masked_network.h"

#include <algorithm>
#include <array>

namespace fastgen::masked_network {
namespace {

constexpr std::int64_t kMostRows = std::int64_t{1} << 24;  // and of anything in the header: memory is asked for by it
constexpr std::int64_t kMost = std::int64_t{1} << 31;  // of any number of a program but an offset: products of two do not overflow

// The inverse of an order, once it names each of its places once.
std::vector<std::int64_t> places_of(const char* op, const char* what, const std::int64_t* order, std::int64_t count) {
  std::vector<std::int64_t> places(static_cast<std::size_t>(count), -1);
  for (std::int64_t i = 0; i < count; ++i) {
    FASTGEN_CHECK(order[i] >= 0 && order[i] < count && places[static_cast<std::size_t>(order[i])] < 0, op, ": program must name each of its ",
                  what, " once");
    places[static_cast<std::size_t>(order[i])] = i;
  }
  return places;
}

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  FASTGEN_CHECK(t.dim() == 1 && t.is_contiguous() && t.scalar_type() == dtype, op, ": ", name, " must be a contiguous vector of the dtype of weights");
}

}  // namespace

Program::Program(const char* op, const Tensor& program, const Tensor& weights, const Tensor& parameters, const OptionalTensor& constants,
                 std::int64_t samples)
    : weights(weights.data_ptr()), parameters(parameters.data_ptr()), weight_count_(weights.numel()), parameter_count_(parameters.numel()) {
  FASTGEN_CHECK(program.scalar_type() == ScalarType::Long && program.dim() == 1 && program.is_contiguous(), op,
                ": program must be a contiguous int64 vector");
  check_vector(op, "weights", weights, weights.scalar_type());
  check_vector(op, "parameters", parameters, weights.scalar_type());
  const std::int64_t length = program.numel(), header_length = sizeof(Header) / sizeof(std::int64_t);
  FASTGEN_CHECK(length >= header_length, op, ": program ends before its last record does");
  const auto* at = static_cast<const std::int64_t*>(program.data_ptr());
  for (std::int64_t i = 0; i < header_length; ++i)
    FASTGEN_CHECK(at[i] >= 0 && at[i] <= kMostRows, op, ": program has a number in its header that is not in [0, ", kMostRows, "]");
  header = *reinterpret_cast<const Header*>(at);
  at += header_length;
  const auto words = [](std::int64_t count, std::size_t size) { return count * static_cast<std::int64_t>(size / sizeof(std::int64_t)); };
  FASTGEN_CHECK(length == header_length + words(header.layers, sizeof(Layer)) + words(header.levels, sizeof(Level)) +
                              words(header.tasks, sizeof(Task)) + header.features + header.outputs + header.residuals,
                op, ": program has a length that is not what its header says");
  layers = reinterpret_cast<const Layer*>(at), at += words(header.layers, sizeof(Layer));
  levels = reinterpret_cast<const Level*>(at), at += words(header.levels, sizeof(Level));
  tasks = reinterpret_cast<const Task*>(at), at += words(header.tasks, sizeof(Task));
  order = at, feature_places = places_of(op, "features", at, header.features), at += header.features;
  output_places = places_of(op, "outputs", at, header.outputs), at += header.outputs;
  residuals = at;
  FASTGEN_CHECK(header.layers > 0, op, ": program has no layer");
  FASTGEN_CHECK(header.features + header.constants <= header.rows, op, ": program has fewer rows than features and constants");
  for (std::int64_t i = 0; i < header.residuals; ++i)
    FASTGEN_CHECK(residuals[i] >= 0 && residuals[i] < header.rows, op, ": program adds rows that it does not have");
  for (const Layer* layer = layers; layer < layers + header.layers; ++layer) {
    FASTGEN_CHECK(layer->activation >= 0 && layer->activation < kNodeActivations, op, ": program has an activation ", layer->activation,
                  ", which is none of NODE_ACTIVATIONS");
    FASTGEN_CHECK(layer->source >= 0 && layer->source <= header.rows, op, ": program has a layer that reads past its rows");
  }
  for (const Level* level = levels; level < levels + header.levels; ++level) {
    const auto inside = [](std::int64_t first, std::int64_t count, std::int64_t end) { return first >= 0 && count >= 0 && first <= end && count <= end - first; };
    FASTGEN_CHECK(inside(level->task, level->tasks, header.tasks) && inside(level->feature, level->features, header.features) &&
                      inside(level->output, level->outputs, header.outputs),
                  op, ": program has a level past its tasks, features or outputs");
    most_outputs = std::max(most_outputs, level->outputs);
  }
  if (constants.has_value()) check_constants(op, constants, samples, weights.scalar_type()), this->constants = constants->data_ptr();
}

void Program::check_constants(const char* op, const OptionalTensor& given, std::int64_t samples, ScalarType dtype) const {
  const bool fits = given.has_value() ? given->dim() == 2 && given->size(0) == samples && given->size(1) == header.constants &&
                                            given->is_contiguous() && given->scalar_type() == dtype
                                      : header.constants == 0;
  FASTGEN_CHECK(fits, op, ": constants must be contiguous [N, ", header.constants, "] in the dtype of weights");
}

void Program::check(const char* op, const Level& level) const {
  const Header& h = header;
  for (const Task* task = tasks + level.task; task < tasks + level.task + level.tasks; ++task) {
    FASTGEN_CHECK(task->layer >= 0 && task->layer < h.layers, op, ": program has a task of a layer that is not there");
    FASTGEN_CHECK(std::min({task->first, task->units, task->known, task->weights}) >= 0 && std::max({task->first, task->units, task->known}) <= kMost, op,
                  ": program has a task with a negative or immense number");
    const Layer& layer = layers[task->layer];
    const std::int64_t end = task->first + task->units;
    FASTGEN_CHECK(task->known <= h.rows - layer.source, op, ": program has a task that reads past its rows");
    FASTGEN_CHECK(task->weights <= weight_count_ && static_cast<double>(task->known) * static_cast<double>(task->units) <=
                                                        static_cast<double>(weight_count_ - task->weights),
                  op, ": program has a task that reads past the weights");
    if (task->layer == h.layers - 1) {
      FASTGEN_CHECK(task->first >= level.output && end <= level.output + level.outputs, op, ": program has a task of outputs that are not its level's");
    } else {
      FASTGEN_CHECK(layer.output >= h.features + h.constants, op, ": program has a layer that writes over its input");
      FASTGEN_CHECK(layer.output <= h.rows - end, op, ": program has a task that writes past its rows");
    }
    const std::int64_t low = h.features, high = h.features + h.constants;
    const auto inside = [&](const char* what, std::int64_t at, std::int64_t first, std::int64_t size) {
      FASTGEN_CHECK(at == -1 || (at >= first && at <= size - end), op, ": program has a task past the ", what);
    };
    inside("raw values", layer.raw, high, h.rows), inside("addends", layer.add, low, high), inside("gates", layer.gate, low, high);
    inside("residuals", layer.residual, 0, h.residuals), inside("biases", layer.bias, 0, parameter_count_);
  }
}

namespace {

constexpr std::int64_t kChunk = 128;  // rows that are summed from zero, which keeps the errors of long sums small

// sums[u][lane] over the first `known` rows of values [known][lanes], weights [known][stride]. Where there are few units several rows are
// summed side by side: the latency of one multiply-add hides behind the others.
template <class T, int units, int vectors>
void product(const T* values, const T* weights, std::int64_t stride, std::int64_t known, T* sums) {
  constexpr int w = kWidth<T>, lanes = vectors * w, ways = units == 1 ? 4 : units == 2 ? 2 : 1;
  for (std::int64_t begin = 0; begin == 0 || begin < known; begin += kChunk) {
    Vec<T> sum[ways][units][vectors];
#pragma GCC unroll 4
    for (int i = 0; i < ways; ++i)
#pragma GCC unroll 16
      for (int u = 0; u < units; ++u)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[i][u][v] = in_all_lanes(T(0));
    const auto step = [&](auto way) {
      constexpr int i = decltype(way)::value;
      Vec<T> x[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) x[v] = load(values + v * w);
#pragma GCC unroll 16
      for (int u = 0; u < units; ++u) {
        const Vec<T> weight = in_all_lanes(weights[u]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[i][u][v] = madd<T>(weight, x[v], sum[i][u][v]);
      }
      values += lanes, weights += stride;
    };
    std::int64_t k = 0;
    const std::int64_t count = std::min(kChunk, known - begin);
    if constexpr (ways == 4)
      for (; k + 4 <= count; k += 4)
        step(std::integral_constant<int, 0>()), step(std::integral_constant<int, 1>()), step(std::integral_constant<int, 2>()),
            step(std::integral_constant<int, 3>());
    if constexpr (ways == 2)
      for (; k + 2 <= count; k += 2) step(std::integral_constant<int, 0>()), step(std::integral_constant<int, 1>());
    for (; k < count; ++k) step(std::integral_constant<int, 0>());
#pragma GCC unroll 16
    for (int u = 0; u < units; ++u)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        T* const to = sums + u * lanes + v * w;
        Vec<T> total = sum[0][u][v];
        if constexpr (ways >= 2) total += sum[1][u][v];
        if constexpr (ways == 4) total += sum[2][u][v] + sum[3][u][v];
        store(to, begin == 0 ? total : Vec<T>(load(to) + total));
      }
  }
}

template <class T>
using Product = void (*)(const T*, const T*, std::int64_t, std::int64_t, T*);
template <class T, int vectors, int... u>
constexpr auto products_of(std::integer_sequence<int, u...>) {
  return std::array<Product<T>, sizeof...(u)>{product<T, u + 1, vectors>...};
}
template <class T, int... v>
constexpr auto all_products(std::integer_sequence<int, v...>) {
  return std::array{products_of<T, v + 1>(std::make_integer_sequence<int, kMostUnits>{})...};
}
// The product of u + 1 units and v + 1 vectors.
template <class T>
constexpr auto kProducts = all_products<T>(std::make_integer_sequence<int, kMostVectors>{});

// What follows the sums of units [first, first + count) of a layer, into `to`, the row of the first.
template <class T>
void finish(const Program& p, const Layer& layer, std::int64_t first, std::int64_t count, const T* sums, std::int64_t lanes, T* values, T* to) {
  const T* const bias = layer.bias < 0 ? nullptr : static_cast<const T*>(p.parameters) + layer.bias + first;
  for (std::int64_t u = 0; u < count; ++u) {
    const Vec<T> b = in_all_lanes(bias == nullptr ? T(0) : bias[u]);
    const auto row = [&](std::int64_t at) { return at < 0 ? nullptr : values + (at + first + u) * lanes; };
    const T *const add = row(layer.add), *const gate = row(layer.gate);
    const T* const residual = layer.residual < 0 ? nullptr : values + p.residuals[layer.residual + first + u] * lanes;
    T* const raw = row(layer.raw);
    for (std::int64_t i = 0; i < lanes; i += kWidth<T>) {
      Vec<T> x = load(sums + u * lanes + i) + b;
      if (add != nullptr) x += load(add + i);
      if (gate != nullptr) x *= load(gate + i);
      if (residual != nullptr) x += load(residual + i);
      if (raw != nullptr) store(raw + i, x);
      store(to + u * lanes + i, activated<T>(static_cast<NodeActivation>(layer.activation), x));
    }
  }
}

}  // namespace

template <class T>
void multiply(std::int64_t units, std::int64_t lanes, const T* values, const T* weights, std::int64_t stride, std::int64_t known, T* sums) {
  kProducts<T>[static_cast<std::size_t>(lanes / kWidth<T> - 1)][static_cast<std::size_t>(units - 1)](values, weights, stride, known, sums);
}

template <class T>
void run(const Program& p, const Level& level, std::int64_t lanes, T* values, T* outputs) {
  alignas(64) T sums[kMostUnits * kMostVectors * kWidth<T>];
  for (const Task* task = p.tasks + level.task; task < p.tasks + level.task + level.tasks; ++task) {
    const Layer& layer = p.layers[task->layer];
    const T* const weights = static_cast<const T*>(p.weights) + task->weights;
    const std::int64_t groups = (task->units + kMostUnits - 1) / kMostUnits;
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t unit = g * task->units / groups, count = (g + 1) * task->units / groups - unit, first = task->first + unit;
      multiply<T>(count, lanes, values + layer.source * lanes, weights + unit, task->units, task->known, sums);
      const bool last = task->layer == p.header.layers - 1;
      finish(p, layer, first, count, sums, lanes, values, last ? outputs + (first - level.output) * lanes : values + (layer.output + first) * lanes);
    }
  }
}

template void multiply(std::int64_t, std::int64_t, const float*, const float*, std::int64_t, std::int64_t, float*);
template void multiply(std::int64_t, std::int64_t, const double*, const double*, std::int64_t, std::int64_t, double*);
template void run(const Program&, const Level&, std::int64_t, float*, float*);
template void run(const Program&, const Level&, std::int64_t, double*, double*);

}  // namespace fastgen::masked_network
