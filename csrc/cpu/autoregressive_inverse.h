// What the inverses of autoregressive maps share: the features level by level, each unit of the network once. A thread owns blocks of samples,
// whose y are replaced by x in place as they become known; log-dets are summed in fp64.
#pragma once

#include "_masked_network.h"
#include "common/scratch.h"

namespace fastgen::masked_network {

inline void check_input(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  FASTGEN_CHECK(t.dim() == 2, op, ": ", name, " must be [N, D]");
}

// A vector of terms to the log-dets of its lanes.
template <class T>
FASTGEN_INLINE void add(Vec<T> terms, double* log_det) {
  alignas(64) T each[kWidth<T>];
  store(each, terms);
  for (int k = 0; k < kWidth<T>; ++k) log_det[k] += static_cast<double>(each[k]);
}

// A Map says how the features of a level follow from their outputs:
//   check(op, level)                                                        that there are as many outputs as it reads
//   scratch()                                                               how many numbers it wants for itself
//   invert(outputs, features, each, lanes, y, log_det, scratch)             in place: y [features][lanes] becomes x; adds to the log-dets
// with outputs [features][each][lanes].
template <class T, class Map>
std::tuple<Tensor, Tensor> invert(const char* op, const Tensor& input, const Tensor& program, const Tensor& weights, const Tensor& parameters,
                                  const OptionalTensor& constants, const Map& map) {
  const std::int64_t samples = input.size(0);
  const Program p(op, program, weights, parameters, constants, samples);
  p.check_constants(op, constants, samples, weights.scalar_type());
  const Header& h = p.header;
  FASTGEN_CHECK(input.size(1) == h.features, op, ": input must be [N, ", h.features, "]");
  for (std::int64_t l = 0; l < h.levels; ++l) map.check(op, p.levels[l]), p.check(op, p.levels[l]);
  Tensor output = empty_contiguous({samples, h.features}, input.scalar_type());
  Tensor log_dets = empty_contiguous({samples}, weights.scalar_type());
  const Tensor y = h.features <= 1 || input.stride(1) == 1 ? input : copy_dense(input, false);
  const Blocks<T> blocks(samples, static_cast<std::int64_t>(torch::stable::get_num_threads()));
  dispatch_dtype(op, input.scalar_type(), [&]<class S>() {
    const S* const from = static_cast<const S*>(y.data_ptr());
    S* const to = static_cast<S*>(output.mutable_data_ptr());
    T* const to_log_det = static_cast<T*>(log_dets.mutable_data_ptr());
    const auto place = [&](std::int64_t c) { return p.feature_places[static_cast<std::size_t>(c)]; };
    parallel(blocks.count, samples * weights.numel(), [&](std::int64_t begin, std::int64_t end) {
      const Scratch<T> values(h.rows * kMostVectors * kWidth<T>), made(p.most_outputs * kMostVectors * kWidth<T>), own(std::max<std::int64_t>(map.scratch(), 1));
      for (std::int64_t b = begin; b < end; ++b) {
        const auto block = blocks[b];
        const std::int64_t lanes = block.lanes;
        read_rows<T>(from + block.sample * y.stride(0), y.stride(0), block.samples, h.features, lanes, place, values.get());
        if (h.constants > 0)
          read_rows<T>(static_cast<const T*>(p.constants) + block.sample * h.constants, h.constants, block.samples, h.constants, lanes,
                       [&](std::int64_t c) { return h.features + c; }, values.get());
        double log_det[kMostVectors * kWidth<T>] = {};
        for (std::int64_t l = 0; l < h.levels; ++l) {
          const Level& level = p.levels[l];
          run<T>(p, level, lanes, values.get(), made.get());
          if (level.features > 0)
            map.invert(made.get(), level.features, level.outputs / level.features, lanes, values.get() + level.feature * lanes, log_det, own.get());
        }
        write_rows<T>(values.get(), lanes, block.samples, h.features, place, to + block.sample * h.features, h.features);
        for (std::int64_t i = 0; i < block.samples; ++i) to_log_det[block.sample + i] = static_cast<T>(log_det[i]);
      }
    });
  });
  return std::tuple(output, log_dets);
}

}  // namespace fastgen::masked_network
