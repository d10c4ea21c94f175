// The program of a cached sampler (PROGRAM_HEADER and what follows it in fastgen/_schema.py), read and checked: whatever the tensor
// holds, nothing that passes here reads or writes outside of its buffers.
#pragma once

#include <algorithm>
#include <vector>

#include "_node_activation.h"
#include "common/tensor.h"

namespace fastgen::incremental {

enum class Kind { kCombine, kProduct, kConcat, kLayerNorm, kAttention, kEmbedding };  // INSTRUCTIONS
enum class Moment { kRow, kPixel, kAfter, kBehind };                                   // MOMENTS
using Activation = NodeActivation;
inline constexpr std::int64_t kActivations = kNodeActivations, kPanelOutputs = 16;

struct Buffer {  // BUFFER_COLUMNS
  std::int64_t constant, channels, height, width, rows, left, right, offset, step;

  std::int64_t columns() const { return left + width + right; }
  std::int64_t per_image() const { return rows * columns() * channels; }
};

struct Operand {
  std::int64_t buffer, start, dy, dx;
};

// A run of `length` numbers of each output's place in a source: channels of one column, or of several side by side.
struct Segment {
  Operand source;
  std::int64_t length, stride;
};

struct Addend {
  Operand source;
  std::int64_t scale;  // of the parameters, -1 for one
};

// The segments of the outputs with (y % upscale, x % upscale) = phase; weights [panels, total, 16].
struct Phase {
  std::int64_t total, weights;
  std::vector<Segment> segments;
};

struct Part {
  Operand source;
  std::int64_t channels, scale;
};

struct Instruction {
  Kind kind;
  Moment moment;
  std::int64_t stage, output;
  Activation activation = Activation::kNone, gate = Activation::kNone;
  std::int64_t bias = -1, upscale = 1;                          // combine
  std::vector<Phase> phases;                                    // combine
  std::vector<Addend> addends;                                  // combine
  std::vector<Part> parts;                                      // concat; else the operands
  std::int64_t weight = -1, eps = -1;                           // layer_norm: with `bias` of the parameters
  std::int64_t heads = 1, scale = -1, strict = 0;               // attention
  std::int64_t table = -1, levels = 0, width = 0;               // embedding: [levels, width] of the parameters
};

// Instructions for the row above go with those of the row.
inline Moment run_at(const Instruction& i) { return i.moment == Moment::kBehind ? Moment::kRow : i.moment; }

struct Program {
  std::int64_t height, width, colors, state;
  Operand output;
  std::int64_t output_channels;
  bool per_color;
  std::vector<Buffer> buffers;
  std::vector<Instruction> instructions;  // by moment and stage, as they are run
  double work = 0;                        // multiply-adds of a pixel

  Program(const char* op, const Tensor& program, std::int64_t weights, std::int64_t parameters, const std::vector<Tensor>& constants,
          std::int64_t images);

 private:
  class Reader;
  void read_instruction(Reader& in);
  void check(const char* op, const Instruction& i, std::int64_t weights, std::int64_t parameters) const;
  void check_operand(const char* op, const Instruction& i, const Operand& o, std::int64_t channels) const;
};

}  // namespace fastgen::incremental
